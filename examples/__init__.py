"""Models on real data, made where they run: cancer and digits from scikit-learn, MiniLM from a wheel.

Read in this order: `catalogue.py` (what is registered and how), `cancer.py`, `digits.py`, `minilm.py` (how
each is made), `register.py` (pushes and deploys them), `traffic.py` (the tour that README gives).
"""
