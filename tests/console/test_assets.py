"""Which templates are compiled when."""

from importlib.resources import files

from jinja2 import Environment, meta

from gateway.console.assets import AT_ONCE, Assets

TEMPLATES = {found.name: found.read_text("utf-8") for found in files("gateway.console").joinpath("templates").iterdir()}


def _made_of(name: str) -> set[str]:
    """Return the templates that a page is made of, itself among them."""
    found, referenced = {name}, meta.find_referenced_templates(Environment(autoescape=True).parse(TEMPLATES[name]))
    for other in referenced:
        assert other is not None
        found |= _made_of(other)
    return found


def test_what_the_event_loop_makes_pages_of_is_compiled_before() -> None:
    assert set(AT_ONCE) == _made_of("problem.html") | _made_of("sign_in.html")


def test_each_template_compiles() -> None:
    """Most do when their page is opened first."""
    assets = Assets()
    for name in TEMPLATES:
        assets._environment.get_template(name)
