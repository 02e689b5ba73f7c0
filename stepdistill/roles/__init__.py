"""The triple generator / fake_score / real_score, and how each role is held, called and sampled."""
