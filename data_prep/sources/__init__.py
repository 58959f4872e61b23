"""Readers, one module for each format. They yield rows `{language: text}`; `text` yields documents, lists of
sentences."""
