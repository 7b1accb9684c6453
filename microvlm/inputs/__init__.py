"""Pictures and text to model inputs. numpy, Pillow and tokenizers only."""
