"""What leaves a worker besides results: previews; and the filters that see all images before they leave."""
