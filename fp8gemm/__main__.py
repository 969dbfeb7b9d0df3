"""`python -m fp8gemm`: the command line."""

from .cli import app

app(prog_name="fp8gemm")
