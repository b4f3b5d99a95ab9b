"""The parent of the API, worker and embedded Redis processes on one host."""
