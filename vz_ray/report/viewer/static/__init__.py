"""What the browser runs: ES modules and CSS as they are, no build step."""
