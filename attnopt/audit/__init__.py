"""A model beside a file that was exported from it: attention by attention, by meaning."""
