"""Names that an untrusted adapter may bear: they must stay text, on a terminal and on a page."""

HOSTILE = ("<script>alert(1)</script>", "a|b`c\nd", "$\\frac{--> &lt;b&gt;")
