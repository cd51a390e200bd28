"""llama.cpp for amoeba_plugin: subnets as GGUF, measured, compared and run."""
