"""Reading YAML: the place of every key, variables, includes, anchors, and text that is no YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from audit_archiver import config
from audit_archiver.config import reading
from audit_archiver.exits import ConfigError
from tests.unit import configs


def read(directory: Path, text: str, **env: str) -> reading.Tree:
    configs.write(directory, text)
    return reading.read("prod.yaml", env, str(directory))


def errors(tree: reading.Tree) -> list[str]:
    return [str(error) for _, error in tree.problems]


def failure(directory: Path, text: str, **env: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(directory, text, **env)
    return str(caught.value)


@pytest.mark.req("REQ-CFG-001", "REQ-CFG-005", "REQ-CFG-008")
def test_every_key_and_list_entry_has_its_line_and_column(tmp_path: Path) -> None:
    tree = read(tmp_path, """\
        # a comment
        s3:
          bucket: b    # another
        databases:
          - name: one
          - name: two
            tables:
              - {name: t}
        """)
    assert tree.value == {"s3": {"bucket": "b"},
                          "databases": [{"name": "one"}, {"name": "two", "tables": [{"name": "t"}]}]}
    assert str(tree.place(("s3", "bucket"))) == "prod.yaml:3"
    assert (tree.place(("databases", 1)).line, tree.place(("databases", 1)).column) == (6, 5)
    assert str(tree.place(("databases", 1, "tables", 0, "name"))) == "prod.yaml:8"


def test_a_key_that_is_missing_is_placed_where_its_section_is(tmp_path: Path) -> None:
    tree = read(tmp_path, "s3:\n  bucket: b\n")
    assert str(tree.place(("s3", "region"))) == "prod.yaml:1"
    assert str(tree.place(("locking", "mode"))) == "prod.yaml:1"


@pytest.mark.parametrize("written, value", [
    ("0123", "0123"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("'5'", "5"), ("5", 5), ("1.5", 1.5),
    ("yes", True), ("null", None), ("~", None), ("", None), ('""', ""), ("=", "="), ("1e3", "1e3"), ("0x1F", 31)])
def test_a_scalar_means_what_it_looks_like(tmp_path: Path, written: str, value: object) -> None:
    found = read(tmp_path, f"a: {written}\n").value["a"]
    assert found == value and type(found) is type(value)


# -- variables


@pytest.mark.req("REQ-CFG-003")
def test_variables_stand_anywhere_in_a_value(tmp_path: Path) -> None:
    tree = read(tmp_path, 'a: ${HOST}\nb: "db-${ENV}.${DOMAIN:-example.com}"\nc: ${X:-}\nd: "${X:-}"\n',
                HOST="h1", ENV="prod", DOMAIN="")
    assert tree.value == {"a": "h1", "b": "db-prod.example.com", "c": None, "d": ""}
    assert not tree.problems


def test_a_variable_cannot_change_the_structure_of_the_file(tmp_path: Path) -> None:
    text = 'x"\nlocking: {enabled: false} # ${OTHER}'
    assert read(tmp_path, "a: ${EVIL}\n", EVIL=text).value == {"a": text}


def test_a_doubled_dollar_keeps_the_braces(tmp_path: Path) -> None:
    tree = read(tmp_path, "a: pa$${word}$$x\n")
    assert tree.value == {"a": "pa${word}$$x"}
    assert not tree.taken and tree.in_clear(("a",))


@pytest.mark.req("REQ-CFG-003", "REQ-CFG-011")
def test_every_variable_that_is_not_set_is_named_with_its_line(tmp_path: Path) -> None:
    tree = read(tmp_path, "a: ${ONE}\nb:\n  - x${TWO}\nc: ${THREE:-3}\n")
    assert errors(tree) == [
        "prod.yaml:1: the environment variable 'ONE' is not set. set it, or write ${ONE:-default}",
        "prod.yaml:3: the environment variable 'TWO' is not set. set it, or write ${TWO:-default}"]


@pytest.mark.parametrize("written", ["${1X}", "${}", "${X-default}", "${X:-${Y}}", "'${X'", "${X:?no}"])
def test_a_broken_variable_is_refused(tmp_path: Path, written: str) -> None:
    tree = read(tmp_path, f"ok: 1\na: {written}\n", X="x", Y="y")
    assert errors(tree) == ["prod.yaml:2: '${' is not followed by a variable's name and '}'. write ${NAME} or "
                            "${NAME:-default}, and $${ for a literal ${"]


def test_it_is_known_whether_a_value_stands_in_the_file_in_clear(tmp_path: Path) -> None:
    tree = read(tmp_path, "a: ${P}\nb: x${P}\nc: ${Q:-secret}\nd: secret\ne: ${P:-secret}\nf: ${Q:-}\n", P="p")
    assert [tree.in_clear((key,)) for key in "abcdef"] == [False, True, True, True, False, False]


# -- anchors, aliases, merge keys


@pytest.mark.req("REQ-CFG-006")
def test_anchors_aliases_and_merge_keys_work_and_the_own_key_wins(tmp_path: Path) -> None:
    tree = read(tmp_path, """\
        x-base: &base {a: 1, b: 2}
        x-more: &more {b: 3, c: 4}
        one: *base
        two:
          <<: [*base, *more]
          a: 0
        """)
    assert tree.value["one"] == {"a": 1, "b": 2}
    assert tree.value["two"] == {"a": 0, "b": 2, "c": 4}
    assert str(tree.place(("two", "c"))) == "prod.yaml:2"
    tree.put(("one", "a"), 9)
    assert tree.value["x-base"]["a"] == 1


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "a: &x {<<: *x}\n", "a: &x\n  b: &y\n    <<: *x\n"])
def test_an_alias_of_itself_is_refused(tmp_path: Path, text: str) -> None:
    assert failure(tmp_path, text).endswith("an alias repeats itself without end")


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "an alias grows beyond" in failure(tmp_path, "\n".join(lines) + "\n")


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    assert errors(read(tmp_path, "a:\n  <<: 5\n")) == [
        "prod.yaml:2: '<<' can only merge a mapping. write '<<: *anchor' of a mapping"]


def test_two_merge_keys_in_one_mapping_are_refused(tmp_path: Path) -> None:
    tree = read(tmp_path, "x: &x {a: 1}\ny: &y {b: 2}\nz:\n  <<: *x\n  <<: *y\n")
    assert errors(tree) == ["prod.yaml:5: '<<' stands twice (line 4). merge a list: '<<: [*one, *two]'"]


# -- keys


def test_a_key_that_is_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    tree = read(tmp_path, "s3:\n  bucket: a\n  prefix: x\n  bucket: b\n")
    assert errors(tree) == ["prod.yaml:4: key 'bucket' is written twice (line 2). keep one of the two"]
    assert tree.value["s3"]["bucket"] == "a"


@pytest.mark.parametrize("key", ["1", "true", "null", "1.5"])
def test_a_key_that_is_not_text_is_refused(tmp_path: Path, key: str) -> None:
    assert errors(read(tmp_path, f"a: 1\n{key}: 2\n")) == [f"prod.yaml:2: key '{key}' is not text. put it in quotes"]


# -- includes


@pytest.mark.req("REQ-CFG-004", "REQ-CFG-008")
def test_an_include_is_read_relative_to_its_file_and_keeps_its_own_lines(tmp_path: Path) -> None:
    configs.write(tmp_path, "tables: !include deep/tables.yaml\nname: one\n", "parts/one.yaml")
    configs.write(tmp_path, "- name: t1\n- name: t2\n", "parts/deep/tables.yaml")
    tree = read(tmp_path, "databases:\n  - !include parts/${WHICH}.yaml\n", WHICH="one")
    assert tree.value == {"databases": [{"name": "one", "tables": [{"name": "t1"}, {"name": "t2"}]}]}
    assert str(tree.place(("databases", 0, "name"))) == "parts/one.yaml:2"
    assert str(tree.place(("databases", 0, "tables", 1, "name"))) == "parts/deep/tables.yaml:2"


def test_an_include_can_be_merged(tmp_path: Path) -> None:
    configs.write(tmp_path, "bucket: b\nprefix: p\n", "common.yaml")
    tree = read(tmp_path, "s3:\n  <<: !include common.yaml\n  prefix: own\n")
    assert tree.value == {"s3": {"prefix": "own", "bucket": "b"}}
    assert str(tree.place(("s3", "bucket"))) == "common.yaml:1"


@pytest.mark.req("REQ-CFG-004")
def test_a_cycle_of_includes_is_refused(tmp_path: Path) -> None:
    configs.write(tmp_path, "a: !include sub/../prod.yaml\n", "other.yaml")
    (tmp_path / "sub").mkdir()
    assert failure(tmp_path, "x: 1\ny: !include other.yaml\n") == (
        "other.yaml:1: '!include sub/../prod.yaml' leads back to 'sub/../prod.yaml'. a file may not include itself, "
        "also not through another one")


def test_the_same_file_may_be_included_twice(tmp_path: Path) -> None:
    configs.write(tmp_path, "k: 1\n", "part.yaml")
    assert read(tmp_path, "a: !include part.yaml\nb: !include part.yaml\n").value == {"a": {"k": 1}, "b": {"k": 1}}


def test_an_include_that_is_missing_is_refused_where_it_is_written(tmp_path: Path) -> None:
    assert failure(tmp_path, "x: 1\ny: !include nowhere.yaml\n") == (
        "prod.yaml:2: cannot read the configuration 'nowhere.yaml': No such file or directory")


def test_an_error_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    configs.write(tmp_path, "a: 1\nb: [1\n", "part.yaml")
    assert failure(tmp_path, "y: !include part.yaml\n").startswith("part.yaml:3:1: not valid YAML: ")


@pytest.mark.parametrize("text, says", [
    ("y: !include ''\n", "prod.yaml:1: '!include' names no file. write '!include other.yaml'"),
    ("y: !include {a: 1}\n", "prod.yaml:1: '!include' names no file. write '!include other.yaml'"),
    ("y: !include empty.yaml\n",
     "prod.yaml:1: the included file 'empty.yaml' is empty. fill it or remove the '!include'")])
def test_an_include_of_nothing_is_refused(tmp_path: Path, text: str, says: str) -> None:
    configs.write(tmp_path, "# nothing\n", "empty.yaml")
    assert errors(read(tmp_path, text)) == [says]


# -- text that is no YAML


@pytest.mark.req("REQ-CFG-008")
@pytest.mark.parametrize("text, says", [
    ("", "prod.yaml:1: the configuration 'prod.yaml' is empty. "
         "write at least 's3:' and 'databases:'; see aa-config(5)"),
    ("# only a comment\n", "prod.yaml:1: the configuration 'prod.yaml' is empty. "
                           "write at least 's3:' and 'databases:'; see aa-config(5)"),
    ("- a\n- b\n", "prod.yaml:1: the configuration must be a mapping of 'key: value' lines. "
                   "write at least 's3:' and 'databases:'; see aa-config(5)"),
    ("s3:\n\tbucket: b\n", r"prod.yaml:2:1: not valid YAML: found character '\t' that cannot start any token. "
                           "indent with spaces, never with tabs"),
    ("a: b: c\n", "prod.yaml:1:5: not valid YAML: mapping values are not allowed here. "
                  "check the indentation, and put a value that holds ': ' in quotes"),
    ("a: [${X}]\n", "prod.yaml:1:6: not valid YAML: expected ',' or ']', but got '{'. "
                    "put a value that holds ${NAME} in double quotes"),
    ("a: 1\n---\nb: 2\n", "prod.yaml:2:1: not valid YAML: but found another document. "
                          "write one document; remove the '---'"),
    ("a: *nowhere\n", "prod.yaml:1:4: not valid YAML: found undefined alias (name). define the anchor (&name) "
                      "above, in the same file; put a value that starts with '*' in quotes"),
    ("a: 'open\n", "prod.yaml:2:1: not valid YAML: found unexpected end of stream. "
                   "check the indentation, the quotes and the brackets of this line and the one above"),
    ("a: 1\nb: \x01\n", "prod.yaml:2:4: character U+0001 may not stand in YAML"),
])
def test_text_that_is_no_yaml_is_refused_with_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    assert failure(tmp_path, text) == says


def test_a_file_that_is_not_utf_8_is_refused_with_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "prod.yaml").write_bytes(b"a: 1\nbc: \xe9\n")
    with pytest.raises(ConfigError) as caught:
        reading.read("prod.yaml", {}, str(tmp_path))
    assert str(caught.value) == "prod.yaml:2:5: the file is not UTF-8. save it as UTF-8"


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "prod.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert reading.read("prod.yaml", {}, str(tmp_path)).value == {"a": 1}


@pytest.mark.req("REQ-DB-007")
@pytest.mark.parametrize("password", ["*hunter2", "!hunter2", "!hunt!er2", "&hunter2 x: y", "%hunter2", "@hunter2"])
def test_an_unquoted_password_that_breaks_yaml_is_not_printed(tmp_path: Path, password: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(tmp_path, configs.SOUND.replace("host: db1.example.com", f"password: {password}"))
    assert "prod.yaml:5" in str(caught.value)
    assert "hunter2" not in str(caught.value) and "hunt!er2" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "a: " + "{a: " * 2_900 + "}" * 2_900, "? " * 100_000,
                                  "a: " + "[" * 2_000 + "]" * 2_000])
def test_deep_nesting_is_an_error_and_not_a_crash(tmp_path: Path, text: str) -> None:
    assert failure(tmp_path, text) == "prod.yaml:1: the nesting is too deep"


@pytest.mark.parametrize("tag", ["!!python/object:os.system ls", "!!binary aGk=", "!!set {a}", "!other x"])
def test_only_plain_types_and_includes_exist(tmp_path: Path, tag: str) -> None:
    assert errors(read(tmp_path, f"a: {tag}\n")) == [
        "prod.yaml:1: a tag ('!...') that is not known. only '!include' is known; put a value that starts with '!' "
        "in quotes"]


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    assert errors(read(tmp_path, "a: .nan\nb: .inf\n")) == [
        "prod.yaml:1: '.nan' is no number to work with. write a finite number",
        "prod.yaml:2: '.inf' is no number to work with. write a finite number"]


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prod.yaml").write_bytes(b"#" * (reading.FILE_BYTES + 1))
    with pytest.raises(ConfigError) as caught:
        config.load("prod.yaml", {}, cwd=str(tmp_path))
    assert str(caught.value) == "'prod.yaml' is larger than 4 MB; is it a configuration?"


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(str(tmp_path), {})
    assert str(caught.value) == f"cannot read the configuration '{tmp_path}': Is a directory"


def test_both_parsers_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    fast = read(tmp_path, configs.SOUND)
    monkeypatch.setattr(reading, "_FAST", yaml.SafeLoader)
    slow = read(tmp_path, configs.SOUND)
    assert (fast.value, fast.places) == (slow.value, slow.places)
