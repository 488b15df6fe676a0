"""JAX's cache of compiled programs, in the data folder."""

import jax

from serve import settings


def enable_compilation_cache() -> None:
    """Set JAX's compilation cache to the data folder, unless the user has set another folder."""
    folder = settings.make_private_folder(settings.data_folder()) / "compiled"
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
