use super::*;

/// Formats what an address may mean.
fn meanings(input: &str) -> String {
    match HubAddress::parse(input) {
        Ok(addresses) => addresses
            .iter()
            .map(|address| {
                let HubRepository { name, revision, .. } = &address.repository;
                format!("{name} {revision} '{}'", address.path)
            })
            .collect::<Vec<_>>()
            .join("; "),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn an_address_has_a_name_a_revision_and_a_path() {
    let check = |input: &str, expected: &str| {
        let got = meanings(&format!("hf://datasets/{input}"));
        assert_eq!(got, expected, "{input}");
    };
    check("squad", "squad main ''");
    check("squad/", "squad main ''");
    check("team/pics", "team/pics main ''; team main 'pics'");
    check(
        "team/pics/a/b.tar",
        "team/pics main 'a/b.tar'; team main 'pics/a/b.tar'",
    );
    check("squad@v1/data", "squad v1 'data'");
    check("team/pics@v1%2F2/x.parquet", "team/pics v1/2 'x.parquet'");
    check(
        "team/pics@refs%2Fconvert%2Fparquet",
        "team/pics refs/convert/parquet ''",
    );
    check(
        "team/pics@refs/convert/parquet/d/0.parquet",
        "team/pics refs/convert/parquet 'd/0.parquet'",
    );
    check("team/pics@refs/pr/12/data", "team/pics refs/pr/12 'data'");
    // What is no revision stays in the name of the file.
    check(
        "team/pics/a@2x.png",
        "team/pics main 'a@2x.png'; team main 'pics/a@2x.png'",
    );
    check("team/pics@main/a%2F.png", "team/pics main 'a%2F.png'");
    assert_eq!(meanings("HF://datasets/squad/"), "squad main ''");
    assert!(is_hub("Hf://datasets/squad") && !is_hub("dir/hf://datasets/squad"));
}

#[test]
fn an_address_that_no_dataset_has_is_refused_with_what_is_wrong() {
    let check = |input: &str, expected: &str| {
        let got = meanings(input);
        assert!(got.contains(expected), "{input}: {got}");
    };
    check(
        "hf://openai/imagegpt-small",
        "give hf://datasets/OWNER/NAME",
    );
    check("hf://DATASETS/a/b", "give hf://datasets/OWNER/NAME");
    check(
        "hf://\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}",
        "give hf://datasets/OWNER/NAME",
    );
    check("hf://spaces/a/b", "give hf://datasets/OWNER/NAME");
    check("hf://datasets/", "'' is not a name of a dataset");
    check("hf://datasets/a b/c", "'a b/c' is not a name of a dataset");
    check("hf://datasets/../c", "is not a name of a dataset");
    check("hf://datasets/a/b@", "'' is not a revision");
    check("hf://datasets/a/b@..%2Fx", "'../x' is not a revision");
    check("hf://datasets/a/b@%ff", "the revision is not UTF-8");
    check("hf://datasets/a/b/../c", "the path contains . or ..");
    let long = format!("hf://datasets/a/b/{}", "x".repeat(5000));
    check(&long, "the limit is 4096");
}

#[test]
fn a_revision_is_written_as_it_is_read() {
    for input in [
        "hf://datasets/squad",
        "hf://datasets/a/b@v1.0-x_y",
        "hf://datasets/a/b@refs%2Fconvert%2Fparquet",
        "hf://datasets/a/b@caf%C3%A9%20%25",
    ] {
        let addresses = HubAddress::parse(input).unwrap();
        assert_eq!(addresses[0].repository.url(), input);
    }
}

#[test]
fn an_input_of_the_hub_is_the_same_under_every_name_of_its_commit() {
    let of = |repository: &str, path: &str| {
        let fact = |name: &str, version: &str| Fact {
            name: name.to_owned(),
            kind: COMMIT.to_owned(),
            items: None,
            bytes: 0,
            version: version.to_owned(),
        };
        let repository = format!("hf://datasets/{repository}");
        let input = HubInput {
            location: Location::Remote {
                store: Arc::new(object_store::memory::InMemory::new()),
                path: path.into(),
                url: format!("{repository}{path}"),
            },
            facts: vec![fact("hf://datasets/a", "0"), fact(&repository, "c1")],
        };
        input.identity()
    };
    assert_eq!(of("a/b", ""), of("a/b@main", ""));
    assert_eq!(of("a/b@v1%2F2", "/d/x.tar"), of("a/b", "/d/x.tar"));
    assert_ne!(of("a/b", "/d/x.tar"), of("a/b", "/d/y.tar"));
    assert_ne!(of("a/b", ""), of("a/c", ""));
}
