"""A run as a KubeRay RayJob: rendered as typed objects, checked against the cluster's schema, applied, followed."""
