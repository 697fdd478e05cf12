"""The order in which workers take files."""

from dataclasses import dataclass
from pathlib import Path

from tests.conftest import slow_files_first


@dataclass(frozen=True)
class Item:
    """A test, as far as the order looks."""

    path: Path
    name: str
    slow: bool = False

    def get_closest_marker(self, name: str) -> str | None:
        return name if self.slow and name == "slow" else None


def test_files_with_slow_tests_come_first_and_then_those_with_many() -> None:
    few, many, slow, mixed = (Path(f"test_{name}.py") for name in ("few", "many", "slow", "mixed"))
    items = [
        Item(few, "1"),
        Item(many, "1"),
        Item(many, "2"),
        Item(slow, "1", slow=True),
        Item(mixed, "1"),
        Item(mixed, "2", slow=True),
        Item(mixed, "3"),
    ]
    slow_files_first(items)  # type: ignore[arg-type]
    assert [item.path for item in items] == [slow, mixed, mixed, mixed, many, many, few]
    assert [item.name for item in items if item.path == mixed] == ["1", "2", "3"]
