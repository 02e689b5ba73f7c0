"""Measuring samples: what a number is worth is its protocol.

images.py, resize.py     from files and tensors to what a feature network sees
features.py, inception.py, judge.py    the networks
statistics.py, frechet.py, kernels.py, manifold.py, diversity.py    from features to numbers
text.py                  CLIP scores, preference models, win rates
protocols.py, fashion.py what is drawn and what it is compared with
drawing.py, measure.py, runner.py      images and numbers, on any number of processes, resumable
report.py, page.py       JSON, Markdown, HTML; rows of two protocols never meet
"""
