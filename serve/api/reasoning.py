"""What a model thinks before it answers, between <think> and </think>, apart from the answer."""

OPEN, CLOSE = "<think>", "</think>"


class Thoughts:
    """Text in as it comes; thoughts and answer out, without the marks and the white space around them."""

    def __init__(self, opened: bool):
        """`opened`: the prompt ends with <think>. Else a text has thoughts only if it begins with that."""
        self._state = "thinking" if opened else "before"
        self._held = ""  # may be a part of a mark, or white space before one
        self._begun = False  # there is something of the thoughts

    def push(self, text: str) -> tuple[str, str]:
        """(thoughts, answer) that are certain now and were not before."""
        self._held += text
        thought = said = ""
        if self._state == "before":
            seen = self._held.lstrip()
            if seen.startswith(OPEN):
                self._state, self._held = "thinking", seen.removeprefix(OPEN)
            elif not OPEN.startswith(seen):
                self._state = "saying"
        if self._state == "thinking":
            thought = self._think()
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "saying" if self._held else "after"
        if self._state == "saying":
            said, self._held = self._held, ""
        return thought, said

    def _think(self) -> str:
        held = self._held if self._begun else self._held.lstrip()
        thought, mark, rest = held.partition(CLOSE)
        if mark:
            self._state, self._held = "after", rest
            return thought.rstrip()
        part = next((n for n in range(len(CLOSE) - 1, 0, -1) if held.endswith(CLOSE[:n])), 0)
        certain = held[: len(held) - part].rstrip()
        self._begun, self._held = self._begun or bool(certain), held[len(certain) :]
        return certain

    def flush(self) -> tuple[str, str]:
        """The rest, at the end."""
        rest, self._held = self._held, ""
        return (rest.rstrip(), "") if self._state == "thinking" else ("", rest if self._state == "before" else "")
