"""Compiles the native kernels where there is a compiler; pyproject.toml has the rest.

They are a plain shared library without the interface of Python, so one build serves every
version of Python; without one, trak installs all the same and uses torch operations.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("trak/_kernels")
SOURCES = (
    "native.c",
    "native.h",
    "native_dense.h",
    "native_scatter.h",
    "native_variants.h",
)


def digest() -> str:
    """Return the digest of the sources, which trak/_kernels/native.py compares."""
    content = b"".join((KERNELS / name).read_bytes() for name in SOURCES)
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return f"0x{int.from_bytes(digest, 'little'):x}ull"


class BuildLibrary(build_ext):
    """Builds a shared library under a name that no version of Python is part of."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return where the library goes, below the root of the packages."""
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return nothing: there is no function that initialises a module."""
        return []


class PlatformWheel(bdist_wheel):
    """Tags a wheel by its platform if the library is in it, and else for any."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, its interface and the platform."""
        built = self.get_finalized_command("build_ext").get_outputs()
        self.root_is_pure = not any(Path(path).exists() for path in built)
        platform = super().get_tag()[2]
        return "py3", "none", "any" if self.root_is_pure else platform


setup(
    ext_modules=[
        Extension(
            "trak._kernels._native",
            [str(KERNELS / "native.c")],
            depends=[str(KERNELS / name) for name in SOURCES],
            define_macros=[("SOURCES", digest())],
            # Contracted products would round otherwise than the other variants do.
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-fno-fast-math",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
