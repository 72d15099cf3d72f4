//! Labelled examples: what the rows of tables say about classes, parts and
//! groups.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;

use super::flags::SplitConfig;
use crate::probe::{ExampleSplit, ProbeTargets, SplitPart, SplitShares};

/// Names of parts, as data sets call them.
const PARTS: [(&str, SplitPart); 8] = [
    ("train", SplitPart::Train),
    ("training", SplitPart::Train),
    ("val", SplitPart::Validation),
    ("valid", SplitPart::Validation),
    ("validation", SplitPart::Validation),
    ("dev", SplitPart::Validation),
    ("test", SplitPart::Test),
    ("testing", SplitPart::Test),
];

/// Examples in the order of their rows. Each column has a value per example, or
/// the tables have no such column.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ExampleRows {
    pub(super) ids: Vec<String>,
    /// Labels of each example: one, or with several labels any number.
    pub(super) labels: Option<Vec<Vec<String>>>,
    pub(super) parts: Option<Vec<String>>,
    pub(super) groups: Option<Vec<String>>,
    /// Names of the files that the rows are from.
    pub(super) files: Vec<String>,
}

/// Part of a data set by its name, in any case.
pub(super) fn part_named(name: &str) -> Option<SplitPart> {
    let mut known = PARTS.iter();
    known
        .find(|(part, _)| part.eq_ignore_ascii_case(name))
        .map(|(_, part)| *part)
}

/// Part that an id names, and the rest of the id after it: `train/cat/1.png` or
/// `data/train/cat/1.png` by a directory, `data/train-00000.parquet#3` by the
/// beginning of a table's name.
fn part_of_id(id: &str) -> Option<(SplitPart, &str)> {
    let mut rest = id;
    while let Some((folder, below)) = rest.split_once('/') {
        if let Some(part) = part_named(folder) {
            return Some((part, below));
        }
        rest = below;
    }
    let (table, _) = rest.split_once('#')?;
    Some((part_of_file(table)?, rest))
}

/// Part that the name of a file begins with: `train-00000.parquet`, `test.csv`.
fn part_of_file(name: &str) -> Option<SplitPart> {
    let begin = name.find(|c: char| !c.is_ascii_alphabetic())?;
    part_named(&name[..begin])
}

impl ExampleRows {
    /// Number of examples.
    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    /// Parts that the rows name: in their column, or all of them in their ids.
    ///
    /// # Errors
    ///
    /// When a value of the column names no part.
    pub(super) fn named_parts(&self) -> anyhow::Result<Option<Vec<SplitPart>>> {
        if let Some(parts) = &self.parts {
            let part = |(id, name): (&String, &String)| {
                part_named(name).with_context(|| {
                    format!(
                        "--split: {id} has the part {name:?}; parts are train, validation (or \
                         val) and test"
                    )
                })
            };
            let parts: anyhow::Result<Vec<_>> = self.ids.iter().zip(parts).map(part).collect();
            return parts.map(Some);
        }
        let parts: Vec<Option<SplitPart>> = (self.ids.iter())
            .map(|id| part_of_id(id).map(|(part, _)| part))
            .collect();
        let without = parts.iter().position(Option::is_none);
        match without {
            None => Ok(Some(parts.into_iter().flatten().collect())),
            Some(without) => {
                self.refuse_mixed(&parts, without)?;
                Ok(None)
            }
        }
    }

    /// Refuses rows of which only some say their part, and files that are parts by
    /// their names while the rows do not say so: test images would be trained on.
    fn refuse_mixed(&self, parts: &[Option<SplitPart>], without: usize) -> anyhow::Result<()> {
        if let Some(with) = parts.iter().position(Option::is_some) {
            anyhow::bail!(
                "{} is in a part by its name, and {} is in none; put all images into train/, \
                 validation/ and test/, or give --split COLUMN",
                self.ids[with],
                self.ids[without]
            );
        }
        // One file, or files that are all of one part, are meant as they are.
        let part_of = |file: &String| part_of_file(file.rsplit('/').next().unwrap_or(file));
        let is_uniform = self
            .files
            .windows(2)
            .all(|files| part_of(&files[0]) == part_of(&files[1]));
        let mut named = self.files.iter().filter(|_| !is_uniform);
        let named = named.find(|file| part_of(file).is_some_and(|part| part != SplitPart::Train));
        match named {
            None => Ok(()),
            Some(file) => anyhow::bail!(
                "{file} is called like a validation or test part, and the ids of its images do \
                 not say so; give --split COLUMN, or the training files alone"
            ),
        }
    }

    /// Classes or labels of all examples; without a column of labels, a class is
    /// the first directory of an id, below the part. Names that are all numbers
    /// are in their order.
    ///
    /// # Errors
    ///
    /// When an example has no label, or labels that cannot be fitted.
    pub(super) fn targets(&self, is_multi_label: bool) -> anyhow::Result<ProbeTargets> {
        let from_ids;
        let labels = if let Some(labels) = &self.labels {
            labels
        } else {
            from_ids = self.directories()?;
            &from_ids
        };
        let names: BTreeSet<&str> = labels.iter().flatten().map(String::as_str).collect();
        let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        if names.iter().all(|name| name.parse::<i64>().is_ok()) {
            names.sort_by_key(|name| name.parse::<i64>().unwrap_or_default());
        }
        let places: BTreeMap<&str, usize> = (names.iter().enumerate())
            .map(|(place, name)| (name.as_str(), place))
            .collect();
        let places_of = |labels: &Vec<String>| -> Vec<usize> {
            let known = labels.iter().filter_map(|label| places.get(label.as_str()));
            known.copied().collect()
        };
        if is_multi_label {
            let mut values = vec![false; self.len() * names.len()];
            for (row, labels) in labels.iter().enumerate() {
                for place in places_of(labels) {
                    values[row * names.len() + place] = true;
                }
            }
            return Ok(ProbeTargets::labels(names, self.len(), values)?);
        }
        let classes = labels.iter().zip(&self.ids).map(|(labels, id)| {
            let [class] = places_of(labels)[..] else {
                anyhow::bail!(
                    "{id} has {} labels; give --multi-label for images with any number of them",
                    labels.len()
                );
            };
            Ok(class)
        });
        let classes: anyhow::Result<Vec<usize>> = classes.collect();
        Ok(ProbeTargets::classes(names, classes?)?)
    }

    fn directories(&self) -> anyhow::Result<Vec<Vec<String>>> {
        let is_split = self.named_parts()?.is_some() && self.parts.is_none();
        let class = |id: &String| {
            let below = match part_of_id(id) {
                Some((_, rest)) if is_split => rest,
                _ => id,
            };
            let class = below.split_once('/').map(|(class, _)| class.to_owned());
            class.map(|class| vec![class]).with_context(|| {
                format!("{id} is in no directory that names its class; give --label COLUMN")
            })
        };
        self.ids.iter().map(class).collect()
    }

    /// Divides the examples into parts: as they are named, and where there is no
    /// validation or test part, by shares.
    ///
    /// # Errors
    ///
    /// When the training part would have too few examples.
    pub(super) fn split(
        &self,
        targets: &ProbeTargets,
        config: &SplitConfig,
    ) -> anyhow::Result<ExampleSplit> {
        let Some(mut parts) = self.named_parts()? else {
            let shares = SplitShares {
                validation: config.validation_share,
                test: config.test_share,
            };
            return self.divided(targets, shares, config.seed);
        };
        anyhow::ensure!(
            parts.contains(&SplitPart::Train),
            "no image is in the training part"
        );
        self.check_groups(&parts)?;
        if !parts.contains(&SplitPart::Validation) && config.validation_share > 0.0 {
            let train: Vec<usize> = (0..parts.len())
                .filter(|&row| parts[row] == SplitPart::Train)
                .collect();
            let shares = SplitShares {
                validation: config.validation_share,
                test: 0.0,
            };
            let rows = self.only(&train);
            let divided = rows.divided(&only(targets, &train)?, shares, config.seed)?;
            for row in divided.validation {
                parts[train[row]] = SplitPart::Validation;
            }
        }
        Ok(ExampleSplit::given(&parts, targets)?)
    }

    /// Checks that no group is in several parts.
    fn check_groups(&self, parts: &[SplitPart]) -> anyhow::Result<()> {
        let mut known: BTreeMap<&String, SplitPart> = BTreeMap::new();
        for (group, part) in self.groups.iter().flatten().zip(parts) {
            anyhow::ensure!(
                *known.entry(group).or_insert(*part) == *part,
                "--group: {group} has images in several parts"
            );
        }
        Ok(())
    }

    fn divided(
        &self,
        targets: &ProbeTargets,
        shares: SplitShares,
        seed: u64,
    ) -> anyhow::Result<ExampleSplit> {
        let Some(groups) = &self.groups else {
            return Ok(ExampleSplit::stratified(targets, shares, seed)?);
        };
        let names: BTreeSet<&String> = groups.iter().collect();
        let numbers: BTreeMap<&String, usize> = names.into_iter().zip(0..).collect();
        let groups: Vec<usize> = groups.iter().map(|group| numbers[group]).collect();
        Ok(ExampleSplit::grouped(targets, &groups, shares, seed)?)
    }

    /// Returns some of the rows, for a division of them.
    fn only(&self, rows: &[usize]) -> Self {
        let groups = self.groups.as_ref();
        Self {
            ids: Vec::new(),
            labels: None,
            parts: None,
            groups: groups.map(|groups| rows.iter().map(|&row| groups[row].clone()).collect()),
            files: Vec::new(),
        }
    }
}

/// Returns the labels of some rows. Classes without an example among them keep
/// their names out, since they cannot be divided.
fn only(targets: &ProbeTargets, rows: &[usize]) -> anyhow::Result<ProbeTargets> {
    let names = targets.names().to_vec();
    if targets.is_multi_label() {
        let values = rows
            .iter()
            .flat_map(|&row| (0..names.len()).map(move |label| targets.has(row, label)));
        let values = values.collect();
        return Ok(ProbeTargets::labels(names, rows.len(), values)?);
    }
    let classes = rows.iter().filter_map(|&row| targets.class(row)).collect();
    Ok(ProbeTargets::classes(names, classes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(ids: &[&str]) -> ExampleRows {
        ExampleRows {
            ids: ids.iter().map(|&id| id.to_owned()).collect(),
            ..ExampleRows::default()
        }
    }

    fn config() -> SplitConfig {
        SplitConfig {
            column: None,
            validation_share: 0.5,
            test_share: 0.0,
            group: None,
            seed: 0,
        }
    }

    #[test]
    fn directories_name_classes_and_parts() {
        use SplitPart::{Test, Train, Validation};

        let check = |ids: &[&str], names: &[&str], parts: Option<&[SplitPart]>| {
            let rows = rows(ids);
            let targets = rows.targets(false).unwrap();
            assert_eq!(targets.names(), names, "{ids:?}");
            assert_eq!(rows.named_parts().unwrap().as_deref(), parts, "{ids:?}");
        };
        check(
            &["cat/1.png", "dog/2.png", "cat/sub/3.png"],
            &["cat", "dog"],
            None,
        );
        check(
            &[
                "train/cat/1.png",
                "val/dog/1.png",
                "test/cat/2.png",
                "train/dog/3.png",
            ],
            &["cat", "dog"],
            Some(&[Train, Validation, Test, Train]),
        );
        check(
            &[
                "data/training/0/1.png",
                "data/testing/1/2.png",
                "data/training/1/3.png",
            ],
            &["0", "1"],
            Some(&[Train, Test, Train]),
        );
        // The names of pictures say nothing.
        check(
            &["cat/train-1.png", "dog/test-2.png"],
            &["cat", "dog"],
            None,
        );
        for (ids, files, is_refused) in [
            (&["test/1.png", "cat/2.png"][..], &["pictures"][..], true),
            (&["a", "b"], &["0/train-0.tar", "0/test-0.tar"], true),
            (&["a", "b"], &["0/test-0.tar", "0/test-1.tar"], false),
            (&["a", "b"], &["my/test-pictures"], false),
        ] {
            let mut rows = rows(ids);
            rows.files = files.iter().map(|&file| file.to_owned()).collect();
            match rows.named_parts() {
                Err(error) => {
                    assert!(error.to_string().contains("--split COLUMN"), "{error}");
                    assert!(is_refused, "{files:?}");
                }
                Ok(parts) => assert!(parts.is_none() && !is_refused, "{files:?}"),
            }
        }
        let error = rows(&["1.png", "cat/2.png"]).targets(false).unwrap_err();
        assert!(error.to_string().contains("1.png is in no directory"));
    }

    #[test]
    fn files_name_parts_and_columns_name_classes() {
        use SplitPart::{Test, Train};
        let mut rows = rows(&["data/train-00000.parquet#0", "data/test-00000.parquet#0"]);
        assert_eq!(rows.named_parts().unwrap().unwrap(), [Train, Test]);
        rows.labels = Some(vec![vec!["10".to_owned()], vec!["9".to_owned()]]);
        assert_eq!(rows.targets(false).unwrap().names(), ["9", "10"]);
        rows.labels = Some(vec![vec!["a".to_owned(), "b".to_owned()], Vec::new()]);
        assert!(
            rows.targets(false)
                .unwrap_err()
                .to_string()
                .contains("--multi-label")
        );
        let targets = rows.targets(true).unwrap();
        assert_eq!((targets.has(0, 1), targets.has(1, 1)), (true, false));
        rows.parts = Some(vec!["TRAIN".to_owned(), "holdout".to_owned()]);
        let error = rows.named_parts().unwrap_err().to_string();
        assert!(error.contains("data/test-00000.parquet#0 has the part \"holdout\""));
    }

    #[test]
    fn a_validation_part_is_made_of_training_images_alone() {
        let ids: Vec<String> = (0..40)
            .map(|n| {
                let part = if n % 4 == 0 { "test" } else { "train" };
                format!("{part}/{}/{n}.png", ["cat", "dog"][n % 2])
            })
            .collect();
        let mut rows = rows(&ids.iter().map(String::as_str).collect::<Vec<_>>());
        let targets = rows.targets(false).unwrap();
        let split = rows.split(&targets, &config()).unwrap();
        assert_eq!(split.test, (0..40).step_by(4).collect::<Vec<_>>());
        assert_eq!(split.validation.len(), 15);
        assert!(split.validation.iter().all(|row| row % 4 != 0));
        // The images of a group are together.
        let person = |n: usize| format!("person {} of {}", n / 8, n.is_multiple_of(4));
        rows.groups = Some((0..40).map(person).collect());
        let split = rows.split(&targets, &config()).unwrap();
        let group = |rows: &[usize]| rows.iter().map(|row| row / 8).collect::<BTreeSet<_>>();
        assert!(!split.validation.is_empty());
        assert!(group(&split.train).is_disjoint(&group(&split.validation)));
        // Parts that are named must have whole groups.
        rows.groups = Some((0..40).map(|n| format!("person {}", n / 8)).collect());
        let error = rows.split(&targets, &config()).unwrap_err().to_string();
        assert!(
            error.contains("person 0 has images in several parts"),
            "{error}"
        );
    }
}
