"""`python -m upfit`, and with it `torchrun ... -m upfit uptrain ...`."""

from upfit.cli import main

if __name__ == "__main__":
    main()
