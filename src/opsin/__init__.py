"""opsin: published vision-language models from shared parts."""
