import subprocess
import sys
from pathlib import Path


def test_the_source_folder_cannot_be_imported_under_a_second_name():
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", "import simulations"], cwd=root, capture_output=True, text=True)
    assert result.returncode != 0
    assert "write `import fedcore.simulations` instead" in result.stderr
