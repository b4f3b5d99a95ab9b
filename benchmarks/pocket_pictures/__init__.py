"""Draw the pictures of the README with the pocket bundle: methods side by side, photographs, prompts."""
