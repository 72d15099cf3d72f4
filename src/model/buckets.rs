//! The batch sizes that an engine runs at.
//!
//! Every size is run once before the worker is ready, so that no caller meets
//! a first run; what does not fill a size is padded up to it. Fixed sizes keep
//! a GPU's memory flat and are what its graphs are captured for.

/// A few sizes, ascending. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets(Vec<usize>);

impl Buckets {
    /// 1, 2, 4 and so on up to `largest`, which is always one of them.
    #[must_use]
    pub fn powers_of_two(largest: usize) -> Self {
        let largest = largest.max(1);
        let powers = std::iter::successors(Some(1_usize), |size| size.checked_mul(2));
        let mut sizes: Vec<usize> = powers.take_while(|&size| size < largest).collect();
        sizes.push(largest);
        Self(sizes)
    }

    /// These sizes, if they ascend from at least 1.
    #[must_use]
    pub fn ascending(sizes: Vec<usize>) -> Option<Self> {
        let ascends = sizes.windows(2).all(|pair| pair[0] < pair[1]);
        (ascends && sizes.first().is_some_and(|&size| size > 0)).then_some(Self(sizes))
    }

    /// One by one.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = usize> {
        self.0.iter().copied()
    }

    #[must_use]
    pub fn smallest(&self) -> usize {
        self.0.first().copied().unwrap_or(1)
    }

    #[must_use]
    pub fn largest(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// The smallest size that holds `n`, or the largest.
    #[must_use]
    pub fn at_least(&self, n: usize) -> usize {
        let found = self.iter().find(|&size| size >= n);
        found.unwrap_or_else(|| self.largest())
    }

    /// The largest size that `n` fill, or the smallest.
    #[must_use]
    pub fn at_most(&self, n: usize) -> usize {
        let found = self.iter().rev().find(|&size| size <= n);
        found.unwrap_or_else(|| self.smallest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |largest, expected: &[usize]| {
            let sizes: Vec<usize> = Buckets::powers_of_two(largest).iter().collect();
            assert_eq!(sizes, expected);
        };
        check(0, &[1]);
        check(1, &[1]);
        check(8, &[1, 2, 4, 8]);
        check(12, &[1, 2, 4, 8, 12]);
        assert_eq!(Buckets::ascending(vec![]), None);
        assert_eq!(Buckets::ascending(vec![0, 1]), None);
        assert_eq!(Buckets::ascending(vec![4, 4]), None);
        let buckets = Buckets::ascending(vec![2, 8]).expect("ascends");
        assert_eq!(
            [1, 2, 3, 8, 9].map(|n| buckets.at_least(n)),
            [2, 2, 8, 8, 8]
        );
        assert_eq!([1, 2, 7, 8, 9].map(|n| buckets.at_most(n)), [2, 2, 2, 8, 8]);
    }
}
