"""The demo: a small pretrained model and public ICD-10-CM codes made into hospitals."""
