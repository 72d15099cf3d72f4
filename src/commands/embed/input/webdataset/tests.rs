//! Tests of tars as all kinds of programs write them. Members are made block by
//! block, since a library writes only well-formed ones.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::super::tests::{local, read_all, reading};
use super::*;
use crate::commands::embed::plan::{Shard, ShardKind};

/// Makes a header of the format ustar.
fn header(name: &[u8], kind: u8, size: usize, link: &[u8]) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    sum(&mut block);
    block
}

/// Writes the sum of a header.
fn sum(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn padded(content: &[u8]) -> Vec<u8> {
    let mut content = content.to_vec();
    content.resize(content.len().next_multiple_of(512), 0);
    content
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    typed(name.as_bytes(), b'0', content)
}

fn typed(name: &[u8], kind: u8, content: &[u8]) -> Vec<u8> {
    let header = header(name, kind, content.len(), b"");
    [&header[..], &padded(content)].concat()
}

fn link(name: &str, kind: u8, target: &str) -> Vec<u8> {
    header(name.as_bytes(), kind, 0, target.as_bytes()).to_vec()
}

fn records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut content = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (1..9).map(|digits| rest + digits);
        let length = length
            .into_iter()
            .find(|n| n.to_string().len() + rest == *n);
        content.extend(format!("{} {key}=", length.unwrap()).bytes());
        content.extend(*value);
        content.push(b'\n');
    }
    typed(b"PaxHeaders/x", b'x', &content)
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

const END: &[u8] = &[0; 1024];

fn shard(content: &[u8]) -> (tempfile::TempDir, Shard) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.tar");
    std::fs::write(&path, content).unwrap();
    let shard = Shard {
        name: "0.tar".to_owned(),
        bytes: content.len() as u64,
        id_base: String::new(),
        kind: ShardKind::WebDataset(local(&path)),
    };
    (dir, shard)
}

/// Reads a tar, and returns a line for each sample: its id with the content of
/// its image, or with the code of its fault. Reading from every cursor must give
/// the same rest.
async fn read_with(content: &[u8], keep: &[&str]) -> (Vec<String>, Result<(), String>) {
    let (_dir, shard) = shard(content);
    let shown = |seen: &[(u64, Sample)]| -> Vec<String> {
        let line = |(_, sample): &(u64, Sample)| match &sample.image {
            Ok(image) => format!("{} {}", sample.id, String::from_utf8_lossy(image)),
            Err(fault) => format!("{} {:?}", sample.id, fault.code),
        };
        seen.iter().map(line).collect()
    };
    let reading = reading(keep);
    let (all, result) = read_all(shard.clone(), 0, reading.clone()).await;
    let lines = shown(&all);
    for (n, (cursor, _)) in all.iter().enumerate() {
        let (rest, _) = read_all(shard.clone(), *cursor, reading.clone()).await;
        assert_eq!(shown(&rest), lines[n..], "from {cursor}");
    }
    let result = result.map_err(|broken| match broken {
        Broken::Damaged(why) | Broken::OverLimit(why) => why,
        other => panic!("{other:?}"),
    });
    (lines, result)
}

async fn check(members: &[Vec<u8>], expected: &[&str]) {
    let tar = [&members.concat()[..], END].concat();
    let (lines, result) = read_with(&tar, &[]).await;
    assert_eq!(result, Ok(()));
    assert_eq!(lines, expected);
    // With sidecar files images are read when their sample is complete.
    let (lines, _) = read_with(&tar, &["txt"]).await;
    assert_eq!(lines, expected);
}

async fn check_damaged(tar: &[u8], expected: &[&str], why: &str) {
    let (lines, result) = read_with(tar, &[]).await;
    let error = result.unwrap_err();
    assert!(error.contains(why), "{error}");
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn every_cursor_begins_at_its_sample() {
    // Longer than the header's field, so the name has a header of its own.
    let long = format!("{}/3.jpg", "long".repeat(60));
    let content = [
        file("0.txt", b"none"),
        file("0.png", b"zero"),
        file("1.png", &[1; 700]),
        file("1.cls", b"7\n"),
        file("2.json", b"{}"),
        typed(b"././@LongLink", b'L', format!("{long}\0").as_bytes()),
        file(&long[..100], b"three"),
        file("4.png", &[4; 1001]),
        END.to_vec(),
    ]
    .concat();
    let (_dir, shard) = shard(&content);
    let (all, result) = read_all(shard.clone(), 0, reading(&["cls", "txt"])).await;
    assert!(result.is_ok(), "{result:?}");
    let ids: Vec<&str> = all.iter().map(|(_, sample)| sample.id.as_str()).collect();
    assert_eq!(
        ids,
        ["0", "1", "2", long.strip_suffix(".jpg").unwrap(), "4"]
    );
    assert_eq!(all[0].1.image.as_deref(), Ok(&b"zero"[..]));
    assert_eq!(all[1].1.image.as_ref().unwrap().len(), 700);
    let message = |idx: usize| all[idx].1.image.as_ref().unwrap_err().message.as_str();
    assert_eq!(
        message(2),
        "image: the sample has no image; its files are json"
    );
    assert!(message(4).contains("1001 bytes, over the limit of 1000"));
    let kept = all[1].1.kept.as_ref().unwrap();
    let numbers = kept.column(0).as_any().downcast_ref::<Int64Array>();
    assert_eq!(numbers.unwrap().value(0), 7);
    for (n, (cursor, _)) in all.iter().enumerate() {
        let (rest, _) = read_all(shard.clone(), *cursor, reading(&[])).await;
        let rest: Vec<&str> = rest.iter().map(|(_, sample)| sample.id.as_str()).collect();
        assert_eq!(rest, ids[n..]);
    }
}

#[tokio::test]
async fn further_images_of_a_sample_have_their_whole_names() {
    check(
        &[
            file("d/IMG_2023.01.jpg", b"one"),
            file("d/IMG_2023.txt", b"text"),
            file("d/IMG_2023.02.jpg", b"two"),
            file("x.jpg", b"three"),
        ],
        &["d/IMG_2023 one", "d/IMG_2023.02.jpg two", "x three"],
    )
    .await;
    check(
        &[
            file("a.seg.png", b"mask"),
            file("a.jpg", b"one"),
            file("a.avif", b"other"),
            file("b.heic", b"other"),
        ],
        &[
            "a mask",
            "a.jpg one",
            "a.avif InvalidArgument",
            "b.heic InvalidArgument",
        ],
    )
    .await;
    // Only files next to each other are one sample; and a directory with a
    // leading dot hides nothing in a tar.
    check(
        &[
            file("a.png", b"one"),
            file("b.png", b"two"),
            file("a.jpg", b"three"),
            file(".d/e.png", b"four"),
            file(".e.png", b"none"),
        ],
        &["a one", "b two", "a.jpg three", ".d/e four"],
    )
    .await;
    // Names that are there again, in a row and later.
    check(
        &[
            file("a.jpg", b"one"),
            file("a.jpg", b"two"),
            file("b.jpg", b"three"),
            file("a.jpg", b"four"),
            file("b.txt", b"no image"),
        ],
        &[
            "a one",
            "a.jpg two",
            "b three",
            "a.jpg#2 four",
            "b.txt InvalidArgument",
        ],
    )
    .await;
}

#[tokio::test]
async fn columns_are_those_of_all_images_of_a_sample() {
    let tar = [
        file("a.1.jpg", b"one"),
        file("a.2.jpg", b"two"),
        file("a.txt", b"text"),
        END.to_vec(),
    ]
    .concat();
    for content in [tar.clone(), gzip(&tar)] {
        let (_dir, shard) = shard(&content);
        let (all, result) = read_all(shard, 0, reading(&["txt"])).await;
        assert!(result.is_ok());
        let kept = all.iter().map(|(_, sample)| {
            let column = sample.kept.as_ref().unwrap().column(0).clone();
            let texts = column.as_any().downcast_ref::<StringArray>().unwrap();
            (sample.id.clone(), texts.value(0).to_owned())
        });
        let expected = [("a", "text"), ("a.2.jpg", "text")];
        assert!(kept.eq(expected.map(|(id, text)| (id.to_owned(), text.to_owned()))));
    }
}

#[tokio::test]
async fn a_link_has_the_image_that_it_leads_to_or_is_an_error() {
    let members = [
        file("d/a.jpg", b"one"),
        link("d/b.jpg", b'1', "d/a.jpg"),
        link("e/c.jpg", b'2', "../d/b.jpg"),
        link("e/d.jpg", b'2', "f.jpg"),
        link("e/e.jpg", b'1', "gone.jpg"),
        file("e/f.jpg", b"two"),
        link("e/g.jpg", b'2', "/d/a.jpg"),
    ];
    check(
        &members,
        &[
            "d/a one",
            "d/b one",
            "e/c one",
            "e/d FailedPrecondition",
            "e/e FailedPrecondition",
            "e/f two",
            "e/g FailedPrecondition",
        ],
    )
    .await;
    let tar = gzip(&[&members[..2].concat()[..], END].concat());
    let (lines, result) = read_with(&tar, &[]).await;
    assert_eq!(result, Ok(()));
    assert_eq!(lines, ["d/a one", "d/b FailedPrecondition"]);
    // A hard link that has its content, and one that only has its size.
    let mut with_size = header(b"c.jpg", b'1', 3, b"a.jpg");
    sum(&mut with_size);
    let with_content = [&header(b"b.jpg", b'1', 3, b"a.jpg")[..], &padded(b"two")].concat();
    check(
        &[
            file("a.jpg", b"one"),
            with_content,
            with_size.to_vec(),
            file("d.jpg", b"three"),
        ],
        &["a one", "b two", "c one", "d three"],
    )
    .await;
}

/// Makes a sparse file in GNU's old format from pieces and the whole size.
fn old_sparse(name: &str, pieces: &[(u64, &[u8])], size: u64) -> Vec<u8> {
    let content: Vec<u8> = pieces
        .iter()
        .flat_map(|(_, piece)| piece.to_vec())
        .collect();
    let entries: Vec<String> = pieces
        .iter()
        .map(|(at, piece)| format!("{at:011o}\0{:011o}\0", piece.len()))
        .collect();
    let mut first = header(name.as_bytes(), b'S', content.len(), b"");
    first[257..265].copy_from_slice(b"ustar  \0");
    let (own, more) = entries.split_at(entries.len().min(4));
    for (n, entry) in own.iter().enumerate() {
        first[386 + 24 * n..][..24].copy_from_slice(entry.as_bytes());
    }
    first[482] = u8::from(!more.is_empty());
    first[483..495].copy_from_slice(format!("{size:011o}\0").as_bytes());
    sum(&mut first);
    let mut member = first.to_vec();
    let blocks = more.chunks(21);
    let n_blocks = blocks.len();
    for (n, entries) in blocks.enumerate() {
        let mut block = [0; 512];
        for (n, entry) in entries.iter().enumerate() {
            block[24 * n..][..24].copy_from_slice(entry.as_bytes());
        }
        block[504] = u8::from(n + 1 < n_blocks);
        member.extend(block);
    }
    member.extend(padded(&content));
    member
}

#[tokio::test]
async fn sparse_files_are_whole_under_their_own_names() {
    let inside = "GNUSparseFile.123/s.jpg";
    let version_1 =
        |map: &str, data: &[u8]| file(inside, &[&padded(map.as_bytes())[..], data].concat());
    let expected: &[&str] = &["a one", "s ab\0\0\0\0cd\0\0", "z last"];
    let first = file("a.jpg", b"one");
    let last = file("z.jpg", b"last");
    let old = old_sparse("s.jpg", &[(0, b"ab"), (6, b"cd"), (10, b"")], 10);
    check(&[first.clone(), old, last.clone()], expected).await;
    let name = ("GNU.sparse.name", &b"s.jpg"[..]);
    let pax_0_0 = records(&[
        ("GNU.sparse.size", b"10"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"0"),
        ("GNU.sparse.numbytes", b"2"),
        ("GNU.sparse.offset", b"6"),
        ("GNU.sparse.numbytes", b"2"),
    ]);
    let s = file("s.jpg", b"abcd");
    check(&[first.clone(), pax_0_0, s, last.clone()], expected).await;
    let pax_0_1 = records(&[
        name,
        ("GNU.sparse.size", b"10"),
        ("GNU.sparse.map", b"0,2,6,2"),
    ]);
    let s = file(inside, b"abcd");
    check(&[first.clone(), pax_0_1.clone(), s, last.clone()], expected).await;
    let pax_1_0 = records(&[
        name,
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"10"),
    ]);
    let s = version_1("2\n0\n2\n6\n2\n", b"abcd");
    check(
        &[first.clone(), pax_1_0.clone(), s.clone(), last.clone()],
        expected,
    )
    .await;
    // A link to a sparse file has its map.
    let with_link = [pax_1_0.clone(), s, link("t.jpg", b'1', "s.jpg")];
    check(&with_link, &["s ab\0\0\0\0cd\0\0", "t ab\0\0\0\0cd\0\0"]).await;
    // A map may lie, and the file after it is read all the same.
    let faulty = &["a one", "s DataLoss", "z last"];
    for map in [
        "1\n0\n5\n",
        "2\n6\n2\n0\n2\n",
        "1\n9\n4\n",
        "1\n18446744073709551615\n4\n",
        "999\n",
        "x",
    ] {
        let s = version_1(map, b"abcd");
        check(&[first.clone(), pax_1_0.clone(), s, last.clone()], faulty).await;
    }
    let many: Vec<(u64, &[u8])> = (0..60).map(|n| (2 * n, &b"x"[..])).collect();
    let old = old_sparse("s.jpg", &many, 120);
    let whole = format!("s {}", "x\0".repeat(60));
    check(&[first, old, last], &["a one", &whole, "z last"]).await;
    let tar = gzip(&[&pax_0_1[..], &file(inside, b"abcd"), END].concat());
    let (lines, _) = read_with(&tar, &[]).await;
    assert_eq!(lines, [expected[1]]);
}

#[tokio::test]
async fn names_are_what_the_tar_says_in_any_encoding() {
    check(
        &[
            typed(b"caf\xe9.jpg", b'0', b"one"),
            typed(b"caf\xe8.jpg", b'0', b"two"),
            typed("café.jpg".as_bytes(), b'0', b"three"),
        ],
        &["caf%E9 one", "caf%E8 two", "café three"],
    )
    .await;
    let long = format!("{}/é.jpg", "d".repeat(300));
    let id = format!("{} two", long.trim_end_matches(".jpg"));
    check(
        &[
            records(&[("hdrcharset", b"BINARY"), ("path", b"\xff%.jpg")]),
            file("other.jpg", b"one"),
            records(&[("path", long.as_bytes()), ("size", b"3")]),
            typed(b"other.jpg", b'0', b"two"),
            records(&[("path", b"x.jpg"), ("path", b"")]),
            file("y.jpg", b"three"),
        ],
        &["%FF%25 one", &id, "y three"],
    )
    .await;
    // The prefix of ustar, and a name that is far too long.
    let mut prefixed = header(b"a.jpg", b'0', 3, b"");
    prefixed[345..348].copy_from_slice(b"d/e");
    sum(&mut prefixed);
    let huge = format!("{}.jpg", "n".repeat(9000));
    let tar = [
        [&prefixed[..], &padded(b"one")].concat(),
        typed(b"././@LongLink", b'L', huge.as_bytes()),
        file("other.jpg", b"two"),
        END.to_vec(),
    ]
    .concat();
    let (lines, result) = read_with(&tar, &[]).await;
    assert_eq!(result, Ok(()));
    assert_eq!(lines[0], "d/e/a one");
    assert!(lines[1].starts_with("nnn") && lines[1].ends_with(" InvalidArgument"));
    assert!(lines[1].len() < 5000);
}

#[tokio::test]
async fn what_is_no_file_is_no_image() {
    check(
        &[
            typed(b"d.jpg/", b'5', b""),
            typed(b"old.jpg/", 0, b""),
            typed(b"pipe.jpg", b'6', b""),
            typed(b"disk.jpg", b'4', b""),
            typed(b"label.jpg", b'V', b""),
            typed(b"d.jpg/a.jpg", 0, b"one"),
            typed(b"b.jpg", b'7', b"two"),
            typed(b"c.jpg", b'M', b"rest"),
            header(b"dir.jpg/", b'5', 4096, b"").to_vec(),
            file("e.jpg", b"three"),
        ],
        &["d.jpg/a one", "b two", "c DataLoss", "e three"],
    )
    .await;
}

#[tokio::test]
async fn tars_after_each_other_are_read_to_the_last() {
    let one = [&file("a.jpg", b"one")[..], END, END].concat();
    let two = [&file("a.jpg", b"two")[..], &file("b.jpg", b"three"), END].concat();
    let expected = ["a one", "a.jpg two", "b three"];
    for tar in [
        [&one[..], &two].concat(),
        [gzip(&one), gzip(&two)].concat(),
        gzip(&[&one[..], &two].concat()),
        [&gzip(&[&one[..], &two].concat())[..], &[0; 300]].concat(),
    ] {
        let (lines, result) = read_with(&tar, &[]).await;
        assert_eq!(result, Ok(()));
        assert_eq!(lines, expected);
    }
    let garbage = [&one[..], &[7; 512]].concat();
    check_damaged(&garbage, &["a one"], "there is no header of a tar, at byte").await;
    let garbage = [&gzip(&one)[..], b"garbage"].concat();
    check_damaged(&garbage, &["a one"], "cannot read on in the tar").await;
    let (lines, result) = read_with(&[0; 10240], &[]).await;
    assert_eq!((lines.len(), result), (0, Ok(())), "an empty tar");
}

#[tokio::test]
async fn a_tar_that_was_cut_off_is_damaged_wherever_it_was() {
    let content = [
        file("0.png", b"zero"),
        file("1.png", &[b'1'; 700]),
        END.to_vec(),
    ]
    .concat();
    let end = content.len() - END.len();
    let all = ["0 zero".to_owned(), format!("1 {}", "1".repeat(700))];
    for cut in (0..=end).step_by(101).chain([512, 1024, end]) {
        for keep in [&[][..], &["txt"]] {
            let (seen, result) = read_with(&content[..cut], keep).await;
            assert!(result.is_err(), "{cut}");
            // With sidecar files, images whose sample is not complete are errors.
            let whole = seen.iter().filter(|line| !line.ends_with("DataLoss"));
            assert!(whole.zip(&all).all(|(seen, all)| seen == all), "{cut}");
        }
    }
    check_damaged(&[], &[], "the file has no bytes").await;
    check_damaged(&gzip(&[]), &[], "the file has no bytes").await;
    let whole = gzip(&content);
    for cut in (2..whole.len()).step_by(7) {
        let (_, result) = read_with(&whole[..cut], &[]).await;
        assert!(result.is_err(), "{cut}");
    }
    check_damaged(b"\x28\xb5\x2f\xfd123", &[], "compressed with zstd").await;
}

#[tokio::test]
async fn a_false_size_takes_no_memory() {
    let mut huge = header(b"a.jpg", b'0', 0, b"");
    huge[124..136].copy_from_slice(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff");
    sum(&mut huge);
    let (_, result) = read_with(&[&huge[..], END].concat(), &[]).await;
    assert!(result.unwrap_err().contains("impossible size"));
    let mut large = header(b"a.jpg", b'0', 0, b"");
    large[124..136].copy_from_slice(b"77777777777\0");
    sum(&mut large);
    let why = "the file ends in the middle of the tar";
    check_damaged(&[&large[..], END].concat(), &["a InvalidArgument"], why).await;
    for kind in [b'L', b'x', b'g'] {
        let mut large = large;
        large[156] = kind;
        sum(&mut large);
        check_damaged(
            &[&large[..], END].concat(),
            &[],
            "over the limit of 1048576",
        )
        .await;
    }
    let broken = typed(b"x", b'x', b"99 path=a.jpg\n");
    check_damaged(
        &[&broken[..], END].concat(),
        &[],
        "an extended header is damaged",
    )
    .await;
    let alone = records(&[("path", b"a.jpg")]);
    check_damaged(&[&alone[..], END].concat(), &[], "belongs to no file").await;
}

#[tokio::test]
async fn images_of_a_compressed_sample_fit_together_or_are_errors() {
    let images = (0..20).map(|n| file(&format!("a.{n:02}.jpg"), &[b'x'; 900]));
    let tar = gzip(&[images.flatten().collect::<Vec<u8>>(), END.to_vec()].concat());
    let (_dir, shard) = shard(&tar);
    let mut reading = reading(&["txt"]);
    reading.memory = crate::commands::embed::memory::ImageMemory::new(5000);
    let (all, result) = read_all(shard.clone(), 0, reading.clone()).await;
    assert!(result.is_ok());
    let images = all.iter().filter(|(_, sample)| sample.image.is_ok());
    assert_eq!((all.len(), images.count()), (20, 5));
    let fault = all[5].1.image.as_ref().unwrap_err();
    assert_eq!(fault.code, GrpcCode::ResourceExhausted);
    // A later run, with memory of its own, has the same errors.
    reading.memory = crate::commands::embed::memory::ImageMemory::new(5000);
    let (rest, _) = read_all(shard, all[3].0, reading).await;
    let failed = |(_, sample): &(u64, Sample)| sample.image.is_err();
    assert!(rest.iter().map(failed).eq(all[3..].iter().map(failed)));
}

#[tokio::test]
async fn sidecar_files_that_are_not_kept_as_they_are_are_counted() {
    let big = vec![b'1'; usize::try_from(SIDECAR_BYTES_MAX).unwrap() + 1];
    let tar = [
        file("0.png", b"zero"),
        file("0.cls", b"dog"),
        file("1.cls", b"1.5"),
        file("1.png", b"one"),
        file("1.b.png", b"another"),
        file("2.png", b"two"),
        file("2.cls", b"9223372036854775808"),
        file("2.json", b"{\"a\": \"\xff\"}"),
        file("3.png", b"three"),
        file("3.cls", b" -9223372036854775808\n"),
        file("3.json", "{\"a\": \"\u{fffd}\"}".as_bytes()),
        file("4.png", b"four"),
        file("4.json", &big),
        link("4.cls", b'2', "gone.cls"),
        // Without an image there is no row to keep a value in.
        file("5.cls", b"cat"),
        END.to_vec(),
    ]
    .concat();
    let (_dir, mut shard) = shard(&tar);
    shard.id_base = "x/".to_owned();
    let keep = ["cls", "json", "txt"];
    let of = reading(&keep);
    let (all, result) = read_all(shard.clone(), 0, of.clone()).await;
    assert!(result.is_ok(), "{result:?}");
    let numbers = all.iter().map(|(_, sample)| {
        let kept = sample.kept.as_ref().unwrap();
        let numbers = kept.column(0).as_any().downcast_ref::<Int64Array>();
        numbers.unwrap().iter().next().unwrap()
    });
    let least = Some(i64::MIN);
    let expected = [None, None, None, None, least, None, None];
    assert_eq!(numbers.collect::<Vec<_>>(), expected);
    let names = keep.map(str::to_owned);
    let expected = [
        "--keep txt: none of the tars' samples that were read has a file of this kind, so the \
         column is empty",
        "--keep cls: the file of this kind is not a whole number in 64 bits in 3 of the tars' \
         samples that were read, so the value is null; the first is x/0",
        "--keep cls: the file of this kind cannot be read (a link without its target, or a name \
         that is not UTF-8) in 1 of the tars' samples that were read, so the value is null; the \
         first is x/4",
        "--keep json: the file of this kind is not UTF-8 in 1 of the tars' samples that were \
         read, so U+FFFD replaces what cannot be read; the first is x/2",
        "--keep json: the file of this kind has over 1 MiB in 1 of the tars' samples that were \
         read, so the value is null; the first is x/4",
    ];
    assert_eq!(of.sidecars.warnings(&names), expected);

    // A job that resumes counts the samples that it reads.
    let resumed = reading(&keep);
    let (cursor, sample) = &all[4];
    assert_eq!(sample.id, "x/3");
    let _ = read_all(shard, *cursor, resumed.clone()).await;
    let warnings = resumed.sidecars.warnings(&names);
    assert_eq!(warnings[1..], [expected[2], expected[4]]);
}
