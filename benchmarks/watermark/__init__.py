"""What the watermark is worth: how often it is found after what happens to images, how often where there is none."""
