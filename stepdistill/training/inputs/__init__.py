"""From sample numbers to what a method is given: prompts and images, encoded live or from caches."""
