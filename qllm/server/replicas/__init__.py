"""Several engines behind one address: where a request goes (choice.py, router.py), and Ray Serve (ray_serve.py)."""
