"""The bundled objective: data preparation and a small language-model trainer; it knows nothing of `raysearch`."""
