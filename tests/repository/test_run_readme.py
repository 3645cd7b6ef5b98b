"""The script that runs the commands of README and docs: which blocks it takes, and that a failure is one."""

import pytest
from repository.run_readme import PAGES, ROOT, SETUP, Block, read_blocks, run_block

TEXT = """# Title

<!-- run -->
```bash
echo one
```

```bash
false
```

<!-- run -->

```python
print(2)
```
"""


def test_marked_blocks_are_run_and_others_not():
    assert read_blocks(TEXT) == [
        Block("bash", "echo one\n", 5, True),
        Block("bash", "false\n", 9, False),
        Block("python", "print(2)\n", 15, True),
    ]


@pytest.mark.parametrize("text", ["<!-- run -->\nwords\n", "<!-- run -->\n```yaml\na: 1\n```\n"])
def test_a_mark_that_cannot_be_followed_is_refused(text):
    with pytest.raises(ValueError):
        read_blocks(text)


@pytest.mark.parametrize(
    ("block", "status", "said"),
    [
        (Block("bash", "test -f README.md && echo here\nfalse | cat\necho not here\n", 1, True), 1, "here\n"),
        (Block("python", "print(given)\n", 1, True), 0, "3\n"),
    ],
)
def test_blocks_are_run_in_the_repository_and_end_at_the_first_failure(block, status, said):
    done = run_block(block, setup="given = 3")
    assert (done.returncode, done.stdout) == (status, said)


def test_readme_and_pages_have_blocks_of_both_kinds_to_run_and_not_too_many():
    blocks = {page.name: [b for b in read_blocks(page.read_text(encoding="utf-8")) if b.runs] for page in PAGES}
    assert blocks["README.md"] and {b.language for found in blocks.values() for b in found} == {"bash", "python"}
    assert 5 <= sum(map(len, blocks.values())) <= 10  # each takes seconds, `make readme` less than three minutes
    compile(SETUP.read_text(encoding="utf-8"), str(SETUP), "exec")


def find_syntax_error(code: str) -> str | None:
    try:
        compile(code, "block", "exec")
    except SyntaxError as error:
        return str(error)
    return None


def test_python_blocks_that_are_not_run_are_python_all_the_same():
    assert find_syntax_error("x = 1") is None and find_syntax_error("x = ") is not None
    blocks = [(page.name, b) for page in PAGES for b in read_blocks(page.read_text(encoding="utf-8"))]
    found = {
        f"{page}:{block.line}": find_syntax_error(block.code) for page, block in blocks if block.language == "python"
    }
    assert len(found) > 5 and {place: error for place, error in found.items() if error} == {}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
