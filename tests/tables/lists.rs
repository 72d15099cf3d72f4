//! Lists: their formats, their quotes, and the ways in which a path or a URL is
//! spelled.

use std::path::Path;

use arrow_array::cast::AsArray as _;

use crate::server::{Answer, serve};
use crate::{
    case, command, done, embed, errors, ids, image, parquet, refused, table, tables, worker,
};

/// Writes the images that the lists of tests/data/tables name.
fn named_images(folder: &Path) {
    std::fs::create_dir_all(folder.join("sub dir")).expect("a folder");
    std::fs::write(folder.join("a.png"), image(1)).expect("a file");
    std::fs::write(folder.join("sub dir/c.png"), image(2)).expect("a file");
}

#[test]
fn a_list_has_ids_of_its_own() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    named_images(dir.path());
    std::fs::copy(case("csv_id_column.csv"), at("l.csv")).expect("a list");
    std::fs::write(at("l.tsv"), "path\tkey\na.png\tk0\nsub dir/c.png\tk1\n").expect("a list");
    let lines =
        "{\"path\":\"a.png\",\"key\":\"k0\"}\n{\"path\":\"sub dir/c.png\",\"key\":\"k1\"}\n";
    std::fs::write(at("l.jsonl"), lines).expect("a list");
    for name in ["l.csv", "l.tsv", "l.jsonl"] {
        let output = at(&format!("o-{name}"));
        done(embed(&[at(name)], &output, &worker).args(["--id-column", "key"]));
        assert_eq!(ids(&output), ["k0", "k1"], "{name}");
    }
    // Two lists with one key; and a field that is empty is no id.
    std::fs::write(at("empty.csv"), "path,key\na.png,\nsub dir/c.png,k\n").expect("a list");
    let output = at("o-empty");
    done(embed(&[at("empty.csv")], &output, &worker).args(["--id-column", "key"]));
    assert_eq!(ids(&output), ["a.png", "k"]);
}

#[test]
fn a_quote_that_is_not_closed_is_one_error_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    named_images(dir.path());
    for n in 3..6 {
        std::fs::write(at(&format!("{n}.png")), image(n)).expect("a file");
    }
    let text = std::fs::read_to_string(case("csv_unclosed_quote.csv")).expect("a list");
    // The list has one image twice, of which one line is good.
    std::fs::write(at("l.csv"), text.replacen("a.png", "4.png", 1)).expect("a list");
    let summary = done(embed(&[at("l.csv")], &at("o"), &worker).args(["--keep", "label"]));
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&2.into(), &1.into())
    );
    assert_eq!(ids(&at("o")), ["sub dir/c.png", "a.png"]);
    let lines = errors(&at("o"));
    let (code, message) = &lines["4.png"];
    assert_eq!(code, "INVALID_ARGUMENT");
    assert!(
        message.contains("line 2 of the list has a quote"),
        "{message}"
    );

    // Two of them close each other, and one is in the path.
    for (name, text, bad) in [
        ("two", "path,label\n3.png,\"5\n4.png,\"6\n5.png,7\n", 2),
        ("path", "path,label\n\"3.png,5\n4.png,6\n5.png,7\n", 1),
    ] {
        let list = at(&format!("{name}.csv"));
        std::fs::write(&list, text).expect("a list");
        let output = at(&format!("o-{name}"));
        let summary = done(&mut embed(&[list], &output, &worker));
        assert_eq!(summary["images"], 3, "{name}");
        assert_eq!(summary["errors"], bad, "{name}");
    }
}

#[test]
fn lines_of_json_and_tabs_are_lists() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    named_images(dir.path());
    std::fs::write(
        at("l.jsonl"),
        "{\"image\":\"a.png\",\"n\":1}\n{\"image\":\"sub dir/c.png\",\"n\":null}\n{\n",
    )
    .expect("a list");
    done(embed(&[at("l.jsonl")], &at("o"), &worker).args(["--keep", "n"]));
    let table = &tables(&at("o"))[0];
    let kept = table
        .column_by_name("n")
        .expect("the column")
        .as_string::<i32>();
    assert_eq!(kept.iter().collect::<Vec<_>>(), [Some("1"), None]);
    assert_eq!(errors(&at("o")).len(), 1);
    std::fs::write(at("l.ndjson"), "\"a.png\"\n\"sub dir/c.png\"\n").expect("a list");
    done(&mut embed(&[at("l.ndjson")], &at("o-paths"), &worker));
    assert_eq!(ids(&at("o-paths")), ["a.png", "sub dir/c.png"]);
    let caption = "caption\tpath\n\"5 inch\ta.png\n6\" long\tsub dir/c.png\n";
    std::fs::write(at("l.tsv"), caption).expect("a list");
    done(embed(&[at("l.tsv")], &at("o-tsv"), &worker).args(["--keep", "caption"]));
    assert_eq!(ids(&at("o-tsv")), ["a.png", "sub dir/c.png"]);
}

#[test]
fn a_line_with_tabs_is_a_row_whatever_quotes_it_has() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    for n in 0..4 {
        std::fs::write(at(&format!("{n}.png")), image(n)).expect("a file");
    }
    let captions = ["\"Hello", "plain", "\"in \"\"quotes\"\"\"", "bye\""];
    let lines = captions.iter().enumerate();
    let lines = lines.map(|(n, caption)| format!("{n}.png\t{caption}\n"));
    let text = format!("path\tcaption\n{}", lines.collect::<String>());
    for name in ["l.tsv", "l.tab"] {
        std::fs::write(at(name), &text).expect("a list");
        let output = at(&format!("o-{name}"));
        let summary = done(embed(&[at(name)], &output, &worker).args(["--keep", "caption"]));
        assert_eq!(
            (&summary["rows"], &summary["errors"]),
            (&4.into(), &0.into())
        );
        let table = &tables(&output)[0];
        let kept = table.column_by_name("caption").expect("the column");
        let kept = kept.as_string::<i32>().iter().flatten();
        let expected = ["\"Hello", "plain", "in \"quotes\"", "bye\""];
        assert_eq!(kept.collect::<Vec<_>>(), expected);
    }
}

#[test]
fn numbers_of_json_keep_their_digits() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    named_images(dir.path());
    let ids = ["12345678901234567890123", "12345678901234567890124"];
    let lines = ids.map(|id| format!("{{\"path\":\"a.png\",\"id\":{id},\"n\":1.10}}\n"));
    std::fs::write(at("l.jsonl"), lines.concat()).expect("a list");
    done(embed(&[at("l.jsonl")], &at("o"), &worker).args(["--id-column", "id", "--keep", "n"]));
    assert_eq!(crate::ids(&at("o")), ids);
    let table = &tables(&at("o"))[0];
    let kept = table.column_by_name("n").expect("the column");
    let kept = kept.as_string::<i32>();
    assert_eq!(kept.iter().collect::<Vec<_>>(), [Some("1.10"); 2]);
}

#[test]
fn an_output_inside_an_input_is_refused_however_it_is_spelled() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("d/sub")).expect("a folder");
    std::fs::write(at("d/1.png"), image(1)).expect("a file");
    std::os::unix::fs::symlink("d/sub", at("link")).expect("a link");
    std::os::unix::fs::symlink("d", at("other")).expect("a link");
    for (input, output) in [
        ("d", "d/o"),
        ("d/", "d/o"),
        ("d", "link/o"),
        ("d", "link"),
        ("other", "d/o"),
        ("d", "link/../o"),
        ("d/sub/..", "d/o"),
    ] {
        let mut command = command(&[at(input)], &at(output));
        let words = ["--output", "lies inside the input"];
        refused(&mut command, &at(output), &words);
    }
}

#[test]
fn a_path_may_be_spelled_as_a_url() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    named_images(dir.path());
    let root = dir.path().display();
    let web = serve(|request| match request.path.as_str() {
        "/a%20b.png" => Answer::new("200 OK", image(3)),
        _ => Answer::new("404 Not Found", ""),
    });
    let lines = [
        format!("file:{root}/a.png"),
        format!("file://{root}/sub%20dir/c.png"),
        format!("file://localhost{root}/a.png"),
        format!("FILE://{root}/a.png"),
        format!("HTTP://{web}/a%20b.png"),
        format!("{root}/sub dir/c.png"),
        format!(
            "{root}/../{}/a.png",
            dir.path().file_name().expect("a name").display()
        ),
        format!("Http://{web}/other.png"),
    ];
    let list = dir.path().join("l.txt");
    std::fs::write(&list, lines.join("\n")).expect("a list");
    let output = dir.path().join("o");
    done(&mut embed(&[list], &output, &worker));
    assert_eq!(ids(&output), lines[..7]);
    assert_eq!(errors(&output)[&lines[7]].0, "NOT_FOUND");
}

#[test]
fn a_path_that_exists_is_that_path_whatever_letters_it_has() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    for (n, name) in ["{a,b}.parquet", "[x]*?.parquet", "{.parquet"]
        .into_iter()
        .enumerate()
    {
        parquet(&at(name), &[table(0..1, &[])], None);
        let output = at(&format!("o-{n}"));
        done(&mut embed(&[at(name)], &output, &worker));
        assert_eq!(ids(&output), [format!("{name}#0")]);
    }
    std::fs::create_dir(at("{1..2}")).expect("a folder");
    std::fs::write(at("{1..2}/a.png"), image(1)).expect("a file");
    done(&mut embed(&[at("{1..2}")], &at("o-folder"), &worker));
    assert_eq!(ids(&at("o-folder")), ["a.png"]);
}
