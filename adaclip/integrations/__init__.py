"""Small adapters to trainers of other packages. Each is imported by its own name; none is needed by adaclip itself.

`adaclip.integrations.lightning`: a callback for PyTorch Lightning. `adaclip.integrations.accelerate`: one function for
Hugging Face Accelerate.
"""
