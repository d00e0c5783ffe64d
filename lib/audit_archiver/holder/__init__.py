"""The transaction holder: keeps database transactions open and lends named operations on them."""
