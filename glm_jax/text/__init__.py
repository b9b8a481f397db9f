"""Text: vocabularies, from text to tokens and back. No TensorFlow here."""
