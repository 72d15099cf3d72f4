//! Tests of lists as all kinds of programs write them.

use super::*;

fn options<'a>(keep: &'a [String], id_column: Option<&'a str>) -> PlanOptions<'a> {
    PlanOptions {
        part_items: 2,
        keep,
        kind: None,
        image_column: None,
        url_column: None,
        id_column,
        output: "/output",
        began: &[],
    }
}

/// Names of rows; those with a fault begin with an exclamation mark.
fn names(rows: &[ListedRow]) -> String {
    let name = |row: &ListedRow| {
        let mark = if row.trouble.is_some() { "!" } else { "" };
        format!("{mark}{}", row.name)
    };
    rows.iter().map(name).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_line_that_is_no_text_is_a_row_with_its_trouble() {
    let list = lines(b"\xef\xbb\xbfa.png\r\n\n b\xff.png\nc.png");
    assert_eq!(names(&list), "a.png !b\u{fffd}.png c.png");
    let keep = ["label".to_owned()];
    let table = b"path,label\na.png,x\nb\xff.png,y\nc.png,\xff\n";
    let rows = comma_rows(table, &options(&keep, None)).unwrap();
    assert_eq!(rows[1].kept, [Some("y".to_owned())]);
    assert_eq!(names(&rows), "a.png !b\u{fffd}.png !c.png");
}

#[test]
fn a_quote_that_is_not_closed_is_a_fault_of_its_line() {
    let keep = ["label".to_owned()];
    let of = |text: &str| {
        let rows = comma_rows(text.as_bytes(), &options(&keep, None)).unwrap();
        names(&rows)
    };
    // Up to the end, up to the next quote, in a row, and as the first field.
    assert_eq!(of("path,label\na,\"5 inch\nb,2\nc,3\n"), "!a b c");
    assert_eq!(of("path,label\na,\"5 inch\nb,2\nc,\"6\nd,4"), "!a b !c d");
    assert_eq!(of("path,label\na,\"5\nb,\"6\n\nc,7\n"), "!a !b c");
    assert_eq!(of("path,label\r\n\"a,5\r\nb,6\r\n"), "!\"a b");
    // These are well formed.
    assert_eq!(
        of("path,label\n\"a\",\"5\"\" inch\"\nb,\"x\ny\"\nc,\"\""),
        "a b c"
    );
    assert_eq!(of("path,label\na,5\" b\n"), "a");
    // A line with other fields than the header.
    assert_eq!(of("path,label\na,1,2\nb\nc,3\n"), "!a !b c");
}

#[test]
fn the_line_of_a_fault_is_counted_from_the_first() {
    let text = b"path,label\na,\"x\ny\"\nb,\"5 inch\n";
    let rows = comma_rows(text, &options(&[], None)).unwrap();
    let fault = rows[1].trouble.as_ref().unwrap();
    assert!(fault.message.starts_with("line 4 of"), "{}", fault.message);
}

#[test]
fn tabs_need_no_quotes() {
    let keep = ["text".to_owned()];
    let table = b"text\tpath\n\"5 inch\ta.png\n\"b, c\"\tb.png\n";
    let rows = tab_rows(table, &options(&keep, None)).unwrap();
    assert_eq!(names(&rows), "a.png b.png");
    assert_eq!(rows[0].kept, [Some("\"5 inch".to_owned())]);
    assert_eq!(rows[1].kept, [Some("b, c".to_owned())]);
}

#[test]
fn a_line_with_tabs_is_a_row_whatever_quotes_it_has() {
    let keep = ["text".to_owned()];
    let kept = |lines: &str| -> String {
        let table = format!("path\ttext\n{lines}");
        let rows = tab_rows(table.as_bytes(), &options(&keep, None)).unwrap();
        let shown = rows.iter().map(|row| {
            let mark = if row.trouble.is_some() { "!" } else { "" };
            format!("{mark}{}={}", row.name, row.kept[0].as_deref().unwrap())
        });
        shown.collect::<Vec<_>>().join(" ")
    };
    // Quotes do not continue over line ends, of any kind.
    for end in ["\n", "\r\n", "\r"] {
        let lines = ["0\t\"Hello", "1\tplain", "", "2\tplain", "3\tbye\""].join(end);
        assert_eq!(kept(&lines), "0=\"Hello 1=plain 2=plain 3=bye\"");
    }
    // A field in quotes is what is between them.
    assert_eq!(kept("0\t\"a \"\"b\"\"\"\n\"1\"\t\"\""), "0=a \"b\" 1=");
    // Any other quote is literal.
    let lines = "0\t\"a\"b\"\n1\ta\"\"b\n2\t\"\n3\t\"a\" b\n4\t\"\"\"a\n";
    assert_eq!(kept(lines), "0=a\"b 1=a\"\"b 2=\" 3=\"a\" b 4=\"\"\"a");
    // A tab within quotes, and lines with other fields than the header.
    assert_eq!(kept("0\t\"a\tb\"\n1\t\"a\tb\n2\n"), "0=a\tb !1=\"a !2=");
    // A quoted header.
    let table = b"\"the\ttext\"\t\"path\"\na\t0\n";
    let rows = tab_rows(table, &options(&["the\ttext".to_owned()], None)).unwrap();
    assert_eq!(names(&rows), "0");
    assert_eq!(rows[0].kept, [Some("a".to_owned())]);
}

#[test]
fn ids_are_taken_from_their_column() {
    let options = options(&[], Some("key"));
    let rows = comma_rows(b"path,key\na.png,k0\nb.png,\n", &options).unwrap();
    assert_eq!(rows[0].id.as_deref(), Some("k0"));
    assert_eq!(rows[1].id, None);
    let missing = comma_rows(b"path\na.png\n", &options).err().unwrap();
    let missing = format!("{missing:#}");
    assert!(
        missing.contains("--id-column key: the list has no such"),
        "{missing}"
    );
}

#[test]
fn lines_of_json_are_objects_or_paths() {
    let keep = ["n".to_owned()];
    let options_of = options(&keep, Some("key"));
    let text = b"{\"path\":\"a.png\",\"n\":1,\"key\":7}\n\"b.png\"\n{\"n\":2}\n[1]\n{\n";
    let rows = json_rows(text, &options_of).unwrap();
    // A row without a path keeps what it has.
    assert_eq!(names(&rows), "a.png b.png ! ![1] !{");
    assert_eq!(rows[2].kept, [Some("2".to_owned())]);
    assert_eq!(rows[0].kept, [Some("1".to_owned())]);
    assert_eq!(rows[0].id.as_deref(), Some("7"));
    assert!(rows.iter().all(|row| row.kept.len() == 1));
    let paths = json_rows(b"\"a.png\"\n\"b.png\"", &options(&[], None)).unwrap();
    assert_eq!(names(&paths), "a.png b.png");
    assert!(json_rows(text, &options(&["m".to_owned()], None)).is_err());
}

#[test]
fn a_column_of_urls_is_the_column_of_paths_in_every_list() {
    let keep = ["t".to_owned()];
    let of_urls = PlanOptions {
        url_column: Some("u"),
        ..options(&keep, None)
    };
    let json = "\u{feff}{\"u\": \"http://a/1.png\", \"path\": \"no\", \"t\": \"x\"}\r\n\n\
                {\"u\": null}\n{\"t\": 2.5, \"u\": \" b.png \"}\n{\"u\": 7, \"t\": {\"a\": []}}\n";
    let mut rows = json_rows(json.as_bytes(), &of_urls).unwrap();
    name_empty_rows(&mut rows, "l.jsonl");
    assert_eq!(names(&rows), "http://a/1.png !l.jsonl#1 b.png !l.jsonl#3");
    let why = |row: &ListedRow| row.trouble.as_ref().unwrap().message.clone();
    assert!(why(&rows[1]).contains("neither a path nor a URL in its column u"));
    assert!(why(&rows[3]).contains("the column u of this line of the list is not text"));
    let kept: Vec<_> = rows.iter().map(|row| row.kept[0].as_deref()).collect();
    assert_eq!(kept, [Some("x"), None, Some("2.5"), Some("{\"a\":[]}")]);
    let table = b"path,u,t\nno,a.png,1\nno,,2\n";
    let mut rows = comma_rows(table, &of_urls).unwrap();
    name_empty_rows(&mut rows, "l.csv");
    assert_eq!(names(&rows), "a.png !l.csv#1");
}

#[test]
fn a_column_that_no_line_has_is_refused_by_name() {
    let json = b"{\"a\": \"x\", \"b\": 1}\n{}\n";
    let check = |url_column, keep: &[&str], expected: &str| {
        let keep: Vec<String> = keep.iter().map(|&name| name.to_owned()).collect();
        let of_urls = PlanOptions {
            url_column,
            ..options(&keep, None)
        };
        let error = json_rows(json, &of_urls).err().unwrap();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    };
    check(
        None,
        &[],
        "no column is known to hold paths; the list's columns are a, b",
    );
    check(
        Some("url"),
        &[],
        "--url-column url: the list has no such column; its columns are a, b",
    );
    check(Some("a"), &["c"], "--keep c: the list has no such column");
}

#[test]
fn a_number_is_the_text_that_stands_in_the_line() {
    let keep = ["n".to_owned()];
    let of = |number: &str| {
        let line = format!("{{\"path\": \"a.png\", \"key\": {number}, \"n\": {number}}}");
        let rows = json_rows(line.as_bytes(), &options(&keep, Some("key"))).unwrap();
        assert!(rows[0].trouble.is_none(), "{number}");
        assert_eq!(rows[0].id, rows[0].kept[0], "{number}");
        rows[0].id.clone().unwrap()
    };
    for number in [
        "12345678901234567890123",
        "12345678901234567890124",
        "-9223372036854775809",
        "1.10",
        "1.0",
        "1E3",
        "-0",
        "0.1000000000000000055511151231257827",
        // Those that were texts of their values before.
        "0",
        "-7",
        "18446744073709551615",
        "2.5",
        "true",
    ] {
        assert_eq!(of(number), number);
    }
    // Within other values, which have no spaces and their keys in order.
    assert_eq!(of("[1.10, {}, \"1.10\"]"), "[1.10,{},\"1.10\"]");
    assert_eq!(
        of("{\"b\": 1.0, \"\\u0061\": [ 2 , null], \"b\": 1.50}"),
        "{\"a\":[2,null],\"b\":1.50}"
    );
    assert_eq!(of("{\"b\": 1, \"a\": 2}"), "{\"a\":2,\"b\":1}");
    // The last of equal keys counts, as everywhere.
    let line = b"{\"path\": \"a.png\", \"key\": 1.0, \"k\\u0065y\": 2.00}";
    let rows = json_rows(line, &options(&[], Some("key"))).unwrap();
    assert_eq!(rows[0].id.as_deref(), Some("2.00"));
    // A line that is nested too deep is an error of its own.
    let deep = format!(
        "{{\"path\": \"a.png\", \"n\": {}1.0{}}}\n{{\"n\": 1.0}}\n",
        "[".repeat(200_000),
        "]".repeat(200_000)
    );
    let rows = json_rows(deep.as_bytes(), &options(&keep, None)).err();
    assert!(rows.is_some(), "no line has a path");
    let rows = json_rows(
        format!("{deep}\"b.png\"\n{{\"path\": \"c.png\"}}").as_bytes(),
        &options(&keep, None),
    )
    .unwrap();
    assert!(rows[0].trouble.is_some() && rows[3].trouble.is_none());
}
