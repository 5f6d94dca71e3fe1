"""Names the packages of the four source folders; everything else is in pyproject.toml."""
from setuptools import find_packages, setup

FOLDERS = {
    "fedcore": "fedcore",
    "fedcore.strategies": "strategies",
    "fedcore.clients": "clients",
    "fedcore.simulations": "simulations",
}

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in [package, *(f"{package}.{below}" for below in find_packages(folder))]
]

setup(packages=packages)
