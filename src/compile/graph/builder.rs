//! Nodes one after another, each named by what it is for.

use std::collections::BTreeSet;

use super::GraphPlan;
use crate::model::onnx::{
    AttributeProto, DataType, GraphProto, IMAGEGPT, IR_VERSION, MICROSOFT, ModelProto, NodeProto,
    OPSET, OperatorSet, TensorProto, ValueInfoProto,
};

/// See the module.
pub(super) struct Builder<'p> {
    pub(super) plan: &'p GraphPlan<'p>,
    graph: GraphProto,
    initializers: BTreeSet<String>,
    /// What nodes are named after: the layer, mostly.
    pub(super) scope: String,
}

impl<'p> Builder<'p> {
    pub(super) fn new(plan: &'p GraphPlan<'p>, name: &str) -> Self {
        Self {
            plan,
            graph: GraphProto {
                name: name.to_owned(),
                ..GraphProto::default()
            },
            initializers: BTreeSet::new(),
            scope: "in".to_owned(),
        }
    }

    pub(super) fn input(&mut self, info: ValueInfoProto) -> String {
        let name = info.name.clone();
        self.graph.input.push(info);
        name
    }

    /// Declares `value` to be an output. The last node that made it is made to
    /// write under the output's name.
    pub(super) fn output(&mut self, value: &str, info: ValueInfoProto) {
        let name = info.name.clone();
        self.graph.output.push(info);
        self.push("Identity", "", &[value], vec![name], Vec::new());
    }

    /// Declares an output that a node already writes by its name.
    pub(super) fn declare_output(&mut self, info: ValueInfoProto) {
        self.graph.output.push(info);
    }

    /// A tensor of `weights.bin`.
    pub(super) fn weight(&mut self, name: &str) -> String {
        let tensor = self
            .plan
            .store
            .get(name)
            .expect("weights are written before graphs, and for all of them");
        if self.initializers.insert(name.to_owned()) {
            self.graph.initializer.push(tensor.clone());
        }
        name.to_owned()
    }

    /// A small constant; `name` must say its value.
    pub(super) fn int64s(&mut self, name: &str, values: &[i64]) -> String {
        if self.initializers.insert(name.to_owned()) {
            self.graph
                .initializer
                .push(TensorProto::int64s(name, values));
        }
        name.to_owned()
    }

    /// No numbers at all, where an operator cannot do without an input.
    pub(super) fn nothing(&mut self) -> String {
        let name = "nothing";
        if self.initializers.insert(name.to_owned()) {
            self.graph.initializer.push(TensorProto {
                name: name.to_owned(),
                dims: vec![0],
                data_type: DataType::Float.into(),
                ..TensorProto::default()
            });
        }
        name.to_owned()
    }

    /// A standard operator with one output.
    pub(super) fn standard(
        &mut self,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let output = self.fresh(operator);
        self.push(operator, "", inputs, vec![output.clone()], attributes);
        output
    }

    /// A fused operator with one output.
    pub(super) fn fused(
        &mut self,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let output = self.fresh(operator);
        self.push(
            operator,
            MICROSOFT,
            inputs,
            vec![output.clone()],
            attributes,
        );
        output
    }

    pub(super) fn push(
        &mut self,
        operator: &str,
        domain: &str,
        inputs: &[&str],
        outputs: Vec<String>,
        attributes: Vec<AttributeProto>,
    ) {
        let name = format!("{}/{operator}.{}", self.scope, self.graph.node.len());
        self.graph.node.push(NodeProto {
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: outputs,
            name,
            op_type: operator.to_owned(),
            domain: domain.to_owned(),
            attribute: attributes,
        });
    }

    /// A name that no value has yet.
    pub(super) fn fresh(&self, what: &str) -> String {
        format!("{}/{what}:{}", self.scope, self.graph.node.len())
    }

    pub(super) fn finish(self) -> ModelProto {
        let domain = |domain: &str, version| OperatorSet {
            domain: domain.to_owned(),
            version,
        };
        ModelProto {
            ir_version: IR_VERSION,
            opset_import: vec![domain("", OPSET), domain(MICROSOFT, 1), domain(IMAGEGPT, 1)],
            producer_name: env!("CARGO_PKG_NAME").to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            graph: Some(self.graph),
        }
    }
}
