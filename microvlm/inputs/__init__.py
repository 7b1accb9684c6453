"""Images and text to model inputs. Needs numpy, Pillow and tokenizers only."""
