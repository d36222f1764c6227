import numpy as np
def signed_squared_correlation(x, y):
    x = x - x.mean(); y = y - y.mean()
    c = (x*y).mean(); s = (x*x).mean()*(y*y).mean()
    return float(np.sign(c)*c*c/s) if s>0 else 0.0
