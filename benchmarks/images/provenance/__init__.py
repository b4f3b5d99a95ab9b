"""What marks cost per image: encoding alone, with XMP, and with a signed C2PA manifest, as CPU time and size."""
