"""What operators run: templates of a site and of the centre, what renders and checks them."""
