"""What an image's metadata say of how it was made: XMP, and signed C2PA manifests."""
