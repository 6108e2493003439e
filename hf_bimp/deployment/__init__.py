"""What the zeros buy: small files, faster inference and exports."""
