"""The routes: one file a resource of the API, the pages and the docs among them."""
