"""What the scripts of the top level import."""

import logging

for library in ("bitsandbytes", "huggingface_hub", "transformers.quantizers"):
    logging.getLogger(library).setLevel(logging.ERROR)  # they warn of what is optional
