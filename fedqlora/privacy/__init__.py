"""Privacy that can be checked: the accountant and the receipts; torch-free."""
