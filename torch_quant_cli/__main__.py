"""``python -m torch_quant_cli``, where the script is not on the path."""

from torch_quant_cli.main import main

if __name__ == "__main__":
    main()
