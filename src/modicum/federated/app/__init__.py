"""The Flower app: this folder is what `flwr run` takes."""
