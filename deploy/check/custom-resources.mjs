// Validates custom resources (a JSON array on standard input) against the
// schemas of their operators, which Kubernetes' own do not have.
import { createRequire } from "node:module";
import path from "node:path";

// The packages lie in target/deploy-tools, not beside this file.
const require = createRequire(path.resolve(process.argv[2], "package.json"));
const classes = {
  "monitoring.coreos.com/v1": require("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1"),
  "keda.sh/v1alpha1": require("@kubernetes-models/keda/keda.sh/v1alpha1"),
};

let text = "";
for await (const chunk of process.stdin) text += chunk;
let failed = 0;
for (const resource of JSON.parse(text)) {
  const kind = `${resource.apiVersion} ${resource.kind}`;
  try {
    const Model = classes[resource.apiVersion]?.[resource.kind];
    if (!Model) throw new Error("no schema");
    new Model(resource).validate();
  } catch (error) {
    failed += 1;
    console.error(`${kind} ${resource.metadata?.name}: ${error.message}`);
  }
}
process.exit(failed ? 1 : 0);
