"""Trains a CvT: python train.py --config=configs/digits.py [--workdir=DIR] [--config.KEY=VALUE ...]"""

from cvt_flax.training.command import main

if __name__ == '__main__':
  main()
