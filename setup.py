"""Builds the kernels of ``csrc`` where there is a C++ compiler; all else works without them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

SOURCES = ["native", "recurrent", "static", "weights", "plain", "avx2", "avxvnni", "avx512vnni"]
HEADERS = [
    "kernels",
    "loops",
    "product",
    "product_loops",
    "rounding",
    "rounding_loops",
    "rows",
    "row_loops",
    "recurrent",
    "recurrent_loops",
    "static",
    "static_loops",
    "dynamic_tiles",
    "dynamic_loops",
    "gate",
    "gate_loops",
    "work",
    "avx2",
]
# No warnings: gcc 12 takes what its own AVX512 headers do for mistakes, thousands of times.
UNIX = ["-std=c++17", "-O3", "-g0", "-w", "-pthread", "-fvisibility=hidden", "-ffp-contract=off",
        "-fno-math-errno"]  # fmt: skip
WINDOWS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]


class BuildKernels(build_ext):
    """A library with a C interface, for ctypes: it depends on no version of Python or torch."""

    def get_ext_filename(self, fullname: str) -> str:
        ending = ".dll" if sys.platform == "win32" else ".so"
        return os.path.join(*fullname.split(".")) + ending

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        self.in_tree = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Objects go to a room of their own, as two environments may be made side by side.

        One library does for all environments of a source tree: what is newer than its sources
        stays, if it is used from there.
        """
        there = Path(self.get_ext_filename(ext.name))
        if self.in_tree and not self.force and _is_newer(there, ext):
            return
        with tempfile.TemporaryDirectory() as room:
            unix = self.compiler.compiler_type != "msvc"
            options = UNIX if unix else WINDOWS

            def compiled(source: str) -> list[str]:
                return self.compiler.compile([source], output_dir=room, extra_postargs=options)

            with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler
                objects = [each for found in pool.map(compiled, ext.sources) for each in found]
            built = Path(room, Path(self.get_ext_filename(ext.name)).name)
            self.compiler.link_shared_object(
                objects, str(built), target_lang="c++", extra_postargs=["-pthread"] if unix else []
            )
            _put(built, Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                _put(built, Path(self.get_ext_filename(ext.name)))


class AnyPython(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _is_newer(built: Path, ext: Extension) -> bool:
    made_from = [*map(Path, ext.sources), *map(Path, ext.depends), Path(__file__)]
    times = [each.stat().st_mtime for each in made_from]
    return built.exists() and built.stat().st_mtime > max(times)


def _put(built: Path, place: Path) -> None:
    """Copy in one step: whoever loads the library meets the old one or the new one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as room:
        os.replace(shutil.copy2(built, room), place)


setup(
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
    ext_modules=[
        Extension(
            "torch_quant.native.kernels",
            [f"csrc/{name}.cpp" for name in SOURCES],
            depends=[f"csrc/{name}.h" for name in HEADERS],
            language="c++",
            optional=True,
        )
    ],
)
