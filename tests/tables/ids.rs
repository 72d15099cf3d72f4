//! Ids: no two images of a job have one, and a column of ids is honored.

use std::path::Path;
use std::sync::Arc;

use arrow_array::types::{Int8Type, TimestampMillisecondType};
use arrow_array::{
    ArrayRef, BinaryArray, Decimal128Array, DictionaryArray, FixedSizeBinaryArray, Float64Array,
    Int64Array, PrimitiveArray, RecordBatch, StringArray, StructArray,
};
use arrow_schema::extension::Uuid;
use arrow_schema::{DataType, Field, Schema};

use crate::{
    arrow, case, command, done, embed, errors, ids, image, parquet, process::said, refused, table,
    worker,
};

#[test]
fn tables_of_one_name_in_two_directories_have_different_ids() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    done(&mut embed(&[case("hive")], &at("hive"), &worker));
    let cat = "label=cat/part-0.parquet";
    let expected = [(cat, 0), (cat, 1), ("label=dog/part-0.parquet", 0)];
    let expected: Vec<String> = expected
        .iter()
        .map(|(name, n)| format!("{name}#{n}"))
        .collect();
    assert_eq!(ids(&at("hive"))[..3], expected);

    // Deeper, and beside a file that keeps its id.
    for (n, name) in ["x/y/0.parquet", "x/z/0.parquet", "0.parquet"]
        .into_iter()
        .enumerate()
    {
        let n = u8::try_from(n).expect("few");
        parquet(&at("deep").join(name), &[table(n..n + 1, &[])], None);
    }
    done(&mut embed(&[at("deep")], &at("o-deep"), &worker));
    assert_eq!(
        ids(&at("o-deep")),
        ["0.parquet#0", "x/y/0.parquet#0", "x/z/0.parquet#0"]
    );

    // Two inputs, as files, as directories, and as Arrow.
    let inputs = [at("deep/x/y/0.parquet"), at("deep/x/z/0.parquet")];
    done(&mut embed(&inputs, &at("o-files"), &worker));
    assert_eq!(ids(&at("o-files")), ["y/0.parquet#0", "z/0.parquet#0"]);
    done(&mut embed(
        &[at("deep/x/y"), at("deep/x/z")],
        &at("o-folders"),
        &worker,
    ));
    assert_eq!(ids(&at("o-folders")), ["y/0.parquet#0", "z/0.parquet#0"]);
    for folder in ["a", "b"] {
        std::fs::create_dir(at(folder)).expect("a folder");
        arrow(&at(folder).join("t.arrow"), &[table(0..1, &[])]);
    }
    done(&mut embed(
        &[at("a/t.arrow"), at("b")],
        &at("o-arrow"),
        &worker,
    ));
    assert_eq!(ids(&at("o-arrow")), ["a/t.arrow#0", "b/t.arrow#0"]);
    // A directory of one input has the name of another input.
    parquet(&at("n/y/0.parquet"), &[table(0..1, &[])], None);
    let inputs = [at("n"), at("deep/x/y"), at("deep/x/z")];
    done(&mut embed(&inputs, &at("o-nested"), &worker));
    let mut all = ids(&at("o-nested"));
    all.sort();
    assert_eq!(all, ["n/y/0.parquet#0", "x/y/0.parquet#0", "z/0.parquet#0"]);
    // Different names need no more.
    let inputs = [at("deep/0.parquet"), at("a/t.arrow")];
    done(&mut embed(&inputs, &at("o-other"), &worker));
    assert_eq!(ids(&at("o-other")), ["0.parquet#0", "t.arrow#0"]);
    let output = at("o-twice");
    let twice = [at("a/t.arrow"), at("a/t.arrow")];
    refused(
        &mut embed(&twice, &output, &worker),
        &output,
        &["t.arrow twice"],
    );
}

#[test]
fn images_of_two_directories_or_lists_have_different_ids() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    for folder in ["a", "b"] {
        std::fs::create_dir(at(folder)).expect("a folder");
        for name in ["1.png", "2.png"] {
            std::fs::write(at(folder).join(name), image(3)).expect("a file");
        }
        std::fs::write(at(folder).join("l.txt"), "1.png\n").expect("a list");
    }
    std::fs::remove_file(at("b/2.png")).expect("a file");
    done(&mut embed(&[at("a"), at("b")], &at("o"), &worker));
    assert_eq!(ids(&at("o")), ["a/1.png", "a/2.png", "b/1.png"]);
    done(&mut embed(
        &[at("a/l.txt"), at("b/l.txt")],
        &at("o-lists"),
        &worker,
    ));
    assert_eq!(ids(&at("o-lists")), ["a/1.png", "b/1.png"]);
}

#[test]
fn an_input_that_is_named_twice_is_refused_however_it_is_spelled() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    for name in ["d/1.png", "tars/0.tar", "l.txt", "l.csv", "tables/t.pq"] {
        std::fs::create_dir_all(at(name).parent().expect("a folder")).expect("a folder");
    }
    std::fs::write(at("d/1.png"), image(1)).expect("a file");
    std::fs::write(at("l.txt"), "d/1.png\n").expect("a list");
    std::fs::write(at("l.csv"), "path\nd/1.png\n").expect("a list");
    parquet(&at("tables/t.pq"), &[table(0..1, &[])], None);
    let mut tar = tar::Builder::new(std::fs::File::create(at("tars/0.tar")).expect("a tar"));
    tar.append_path_with_name(at("d/1.png"), "1.png")
        .expect("a file");
    tar.finish().expect("an end");
    let output = at("output");
    for inputs in [
        ["d", "d"],
        ["d", "d/"],
        ["d", "./d"],
        ["./d/", "tars/../d"],
        ["tars/0.tar", "tars/0.tar"],
        ["tars", "tars"],
        ["tars/0.tar", "{./tars,nowhere}/0.tar"],
        ["l.txt", "l.txt"],
        ["l.csv", "d/../l.csv"],
        ["tables/", "tables"],
        ["tables/t.pq", "./tables//t.pq"],
        // A file of a directory beside the directory.
        ["tars", "d/../tars/0.tar"],
        ["tables/", "tables/t.pq"],
        // A bucket is not asked for this.
        ["s3://bucket/p", "s3://bucket/p/"],
    ] {
        let mut command = command(&inputs, &output);
        command.current_dir(dir.path());
        command.envs([
            ("AWS_ACCESS_KEY_ID", "k"),
            ("AWS_SECRET_ACCESS_KEY", "k"),
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ]);
        refused(&mut command, &output, &["twice", "name it once"]);
    }
}

/// Returns the version of an output's manifest, and sets another.
fn version(output: &Path, other: Option<u32>) -> String {
    let at = output.join("_imagegpt/manifest.json");
    let text = std::fs::read_to_string(&at).expect("a manifest");
    let manifest: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let version = manifest["version"].to_string();
    if let Some(other) = other {
        let old = format!("\"version\": {version}");
        let text = text.replacen(&old, &format!("\"version\": {other}"), 1);
        std::fs::write(at, text).expect("a manifest");
    }
    version
}

#[test]
fn a_job_of_an_older_version_goes_on_or_is_told_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    parquet(&at("t.parquet"), &[table(0..2, &[])], None);
    let plain = at("plain");
    done(&mut embed(&[at("t.parquet")], &plain, &worker));
    assert_eq!(version(&plain, None), "1");
    let nested = at("nested");
    done(&mut embed(&[case("hive")], &nested, &worker));
    assert_eq!(version(&nested, Some(1)), "2");
    let ended = embed(&[case("hive")], &nested, &worker).output();
    let ended = ended.expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(crate::REFUSED),
        "{}",
        said(&ended)
    );
    let text = said(&ended);
    assert!(text.contains("begun by an older imagegpt"), "{text}");
    assert!(text.contains("give another --output"), "{text}");
}

#[test]
fn a_column_of_ids_is_taken_whatever_its_type() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    for name in ["id_column_dict", "id_column_binary"] {
        let input = case(&format!("{name}.parquet"));
        let output = at(name);
        done(embed(&[input], &output, &worker).args(["--id-column", "key"]));
        assert_eq!(ids(&output), ["k0", "k1", "k2"], "{name}");
        assert_eq!(version(&output, None), "2", "{name}");
    }
    let int8: DictionaryArray<Int8Type> = vec!["a", "b"].into_iter().collect();
    let decimal = Decimal128Array::from(vec![150, 275]).with_precision_and_scale(9, 2);
    let time = PrimitiveArray::<TimestampMillisecondType>::from(vec![0, 1000]);
    let columns: Vec<(&str, ArrayRef, [&str; 2])> = vec![
        ("dictionary", Arc::new(int8), ["a", "b"]),
        (
            "decimal",
            Arc::new(decimal.expect("a type")),
            ["1.50", "2.75"],
        ),
        (
            "float",
            Arc::new(Float64Array::from(vec![0.5, -1.0])),
            ["0.5", "-1.0"],
        ),
        (
            "time",
            Arc::new(time.with_timezone("UTC")),
            ["1970-01-01T00:00:00Z", "1970-01-01T00:00:01Z"],
        ),
        // A null is no id.
        (
            "null",
            Arc::new(Int64Array::from(vec![Some(7), None])),
            ["7", "null.parquet#1"],
        ),
    ];
    for (name, column, expected) in columns {
        let input = at(&format!("{name}.parquet"));
        parquet(&input, &[table(0..2, &[("key", column)])], None);
        let output = at(&format!("o-{name}"));
        done(embed(&[input], &output, &worker).args(["--id-column", "key"]));
        assert_eq!(ids(&output), expected, "{name}");
    }
    // What is no text is an error of its row.
    let bytes = BinaryArray::from(vec![&b"ok"[..], b"\xff"]);
    parquet(
        &at("b.parquet"),
        &[table(0..2, &[("key", Arc::new(bytes))])],
        None,
    );
    let output = at("o-bytes");
    done(embed(&[at("b.parquet")], &output, &worker).args(["--id-column", "key"]));
    assert_eq!(ids(&output), ["ok"]);
    assert_eq!(errors(&output)["b.parquet#1"].0, "INVALID_ARGUMENT");
}

#[test]
fn a_uuid_is_an_id_and_stays_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let uuids = [[0x11_u8; 16], [0xab; 16]];
    let column = FixedSizeBinaryArray::try_from_iter(uuids.into_iter()).expect("UUIDs");
    let mut key = Field::new("key", DataType::FixedSizeBinary(16), false);
    key.try_with_extension_type(Uuid).expect("UUIDs");
    let images = table(0..2, &[]);
    let image = images.schema().field(0).clone();
    let schema = Schema::new(vec![image, key]);
    let columns = vec![Arc::clone(images.column(0)), Arc::new(column) as ArrayRef];
    let batch = RecordBatch::try_new(Arc::new(schema), columns).expect("a table");
    parquet(&at("u.parquet"), std::slice::from_ref(&batch), None);
    arrow(&at("u.arrow"), &[batch]);
    for name in ["u.parquet", "u.arrow"] {
        let output = at(&format!("o-{name}"));
        let flags = ["--id-column", "key", "--keep", "key"];
        done(embed(&[at(name)], &output, &worker).args(flags));
        assert_eq!(
            ids(&output),
            [
                "11111111-1111-1111-1111-111111111111",
                "abababab-abab-abab-abab-abababababab"
            ],
            "{name}"
        );
        let kept = crate::tables(&output)[0].schema();
        let kept = kept.field_with_name("key").expect("the column");
        assert!(kept.has_valid_extension_type::<Uuid>(), "{name}: {kept}");
    }
}

#[test]
fn a_column_that_can_be_no_id_is_refused_with_its_type() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let inner: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    let field = Arc::new(Field::new("n", DataType::Int64, true));
    let structs = StructArray::from(vec![(field, inner)]);
    let lists =
        arrow_array::ListArray::from_iter_primitive::<arrow_array::types::Int32Type, _, _>(vec![
            Some(vec![Some(1)]),
            Some(vec![]),
        ]);
    let output = at("output");
    let columns: [(&str, ArrayRef, &str); 2] = [
        ("struct", Arc::new(structs), "Struct"),
        ("list", Arc::new(lists), "List"),
    ];
    for (name, column, kind) in columns {
        let input = at(&format!("{name}.parquet"));
        parquet(&input, &[table(0..2, &[("key", column)])], None);
        let mut command = embed(&[input], &output, &worker);
        let words = ["--id-column key: the column holds", kind];
        refused(command.args(["--id-column", "key"]), &output, &words);
    }
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    parquet(&at("t.parquet"), &[table(0..2, &[("key", texts)])], None);
    let mut command = embed(&[at("t.parquet")], &output, &worker);
    refused(
        command.args(["--id-column", "kye"]),
        &output,
        &["--id-column kye", "key (Utf8)"],
    );
}
